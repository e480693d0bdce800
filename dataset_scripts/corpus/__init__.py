"""A pretraining corpus from any archive of DICOM, PNG or JPEG: `python -m dataset_scripts.corpus`."""
