"""After transformers' tests/pipelines/test_pipelines_image_feature_extraction.py, with local images."""

import unittest

import numpy as np
import torch
from PIL import Image
from transformers import ImageFeatureExtractionPipeline

from .local_image import PATH


class ImageFeatureExtractionPipelineTests(unittest.TestCase):
    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        pipe = ImageFeatureExtractionPipeline(
            model=model,
            tokenizer=tokenizer,
            feature_extractor=feature_extractor,
            image_processor=image_processor,
            processor=processor,
            dtype=dtype,
        )
        img = Image.open(PATH)
        return pipe, [img, img]

    def run_pipeline_test(self, pipe, examples):
        outputs = pipe(examples[0])
        self.assertEqual(len(outputs), 1)
        outputs = pipe(examples)
        self.assertEqual(len(outputs), 2)
        # of test_image_processing_small_model_pt and test_return_tensors_pt

        outputs = pipe(examples[0], pool=True)
        self.assertEqual(np.squeeze(outputs).shape, (pipe.model.config.hidden_size,))
        self.assertTrue(torch.is_tensor(pipe(examples[0], return_tensors=True)))
