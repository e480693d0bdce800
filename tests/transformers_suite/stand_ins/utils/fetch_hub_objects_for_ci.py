"""Stands in for a module of transformers' repository, of which the tests import one function."""

import os


def url_to_local_path(url, return_url_if_not_found=True):
    name = url.split("/")[-1]
    return name if os.path.exists(name) or not return_url_if_not_found else url
