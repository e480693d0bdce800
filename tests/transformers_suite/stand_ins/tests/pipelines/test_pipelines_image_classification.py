"""After transformers' tests/pipelines/test_pipelines_image_classification.py, with local images."""

import unittest

from PIL import Image
from transformers import ImageClassificationPipeline

from .local_image import PATH


class ImageClassificationPipelineTests(unittest.TestCase):
    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        pipe = ImageClassificationPipeline(
            model=model,
            tokenizer=tokenizer,
            feature_extractor=feature_extractor,
            image_processor=image_processor,
            processor=processor,
            dtype=dtype,
            top_k=2,
        )
        return pipe, [Image.open(PATH), PATH]

    def run_pipeline_test(self, pipe, examples):
        def check(result):
            self.assertEqual(len(result), 2)
            for each in result:
                self.assertIsInstance(each["score"], float)
                self.assertIsInstance(each["label"], str)

        check(pipe(PATH))
        gray = Image.open(PATH)
        results = pipe([gray, PATH, gray.convert("RGBA"), gray.convert("LA"), gray.convert("L")])
        self.assertEqual(len(results), 5)
        for each in results:
            check(each)
