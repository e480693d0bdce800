"""transformers' own common tests of models, backbones, configurations, image processors and pipelines, on our classes.

They are those that every model inside transformers has to pass, unmodified, from the source distribution of the
installed version: `make test-transformers` fetches it and runs this file, dense and with a tissue mask. What the source
distribution leaves out is in `stand_ins/`. A test that does not fit is named here with the reason (DOES_NOT_FIT).
"""

import inspect
import json
import os
import pathlib
import sys
import tempfile
import unittest

SOURCE = pathlib.Path(os.environ["TRANSFORMERS_SOURCE"])  # the unpacked source distribution, with the stand-ins in it
sys.path[:0] = [str(SOURCE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

TINY_MODELS = tempfile.mkdtemp(prefix="transformers_suite")
os.makedirs(f"{TINY_MODELS}/reports")
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = TINY_MODELS
with open(f"{TINY_MODELS}/reports/tiny_model_summary.json", "w") as file:
    json.dump(
        {
            name: {"tokenizer_classes": [], "processor_classes": ["MammoDinoImageProcessor"]}
            for name in ("MammoDinoModel", "MammoDinoForImageClassification")
        },
        file,
    )

from tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402
from torch import nn  # noqa: E402
from transformers.processing_utils import Unpack  # noqa: E402
from transformers.testing_utils import require_torch, require_vision, torch_device  # noqa: E402
from transformers.utils import TransformersKwargs  # noqa: E402

from modeling_mammodino import (  # noqa: E402
    MammoDinoBackbone,
    MammoDinoConfig,
    MammoDinoForImageClassification,
    MammoDinoImageProcessor,
    MammoDinoModel,
)
from tests import test_modeling_common, test_pipeline_mixin  # noqa: E402

test_pipeline_mixin.transformers_module.MammoDinoImageProcessor = MammoDinoImageProcessor
# The suite knows by name, from transformers' tables, which classes have a loss and which are base models; register()
# fills other tables. Only the test module's own names are replaced.
for table, name in (
    ("MODEL_MAPPING_NAMES", "MammoDinoModel"),
    ("MODEL_FOR_BACKBONE_MAPPING_NAMES", "MammoDinoBackbone"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MammoDinoForImageClassification"),
):
    setattr(test_modeling_common, table, {**getattr(test_modeling_common, table), "mammodino": name})
# It reads from the annotation of **kwargs whether a model can give attentions.
for model_class in (MammoDinoModel, MammoDinoBackbone, MammoDinoForImageClassification):
    inspect.unwrap(model_class.forward).__annotations__["kwargs"] = Unpack[TransformersKwargs]


# tests of image processors that do not fit ours, and why
DOES_NOT_FIT = {
    "test_image_processor_from_dict_with_kwargs_has_attributes": "gives settings that ours has not, which are refused",
    "test_call_numpy_4_channels": "an image of four channels is no gray image, and refused",
    "test_new_models_require_torchvision_backend": "a rule of transformers' own repository; ours needs no torchvision",
    "test_pil_can_run_without_torchvision": "imports the processor from transformers' own repository",
}


class MammoDinoModelTester:
    """After transformers' tests/models/dinov2_with_registers/test_modeling_dinov2_with_registers.py, one channel."""

    config_class, model_class = MammoDinoConfig, MammoDinoModel
    backbone_class, classifier_class = MammoDinoBackbone, MammoDinoForImageClassification
    with_tissue = False

    def __init__(
        self,
        parent,
        batch_size=13,
        image_size=30,
        patch_size=2,
        num_channels=1,
        is_training=True,
        use_labels=True,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        type_sequence_label_size=10,
        initializer_range=0.02,
        num_register_tokens=2,
        mask_ratio=0.5,
    ):
        self.parent = parent
        self.batch_size = batch_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.is_training = is_training
        self.use_labels = use_labels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.type_sequence_label_size = type_sequence_label_size
        self.initializer_range = initializer_range
        self.num_register_tokens = num_register_tokens
        num_patches = (image_size // patch_size) ** 2
        self.seq_length = num_patches + 1 + self.num_register_tokens
        self.mask_ratio = mask_ratio
        self.num_masks = int(mask_ratio * self.seq_length)
        self.mask_length = num_patches

    def prepare_config_and_inputs(self):
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        labels = ids_tensor([self.batch_size], self.type_sequence_label_size) if self.use_labels else None
        return self.get_config(), pixel_values, labels

    def get_config(self):
        return self.config_class(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            hidden_act=self.hidden_act,
            hidden_dropout_prob=self.hidden_dropout_prob,
            attention_probs_dropout_prob=self.attention_probs_dropout_prob,
            is_decoder=False,
            initializer_range=self.initializer_range,
            num_register_tokens=self.num_register_tokens,
        )

    def create_and_check_model(self, config, pixel_values, labels):
        model = self.model_class(config=config).to(torch_device).eval()
        result = model(pixel_values)
        self.parent.assertEqual(result.last_hidden_state.shape, (self.batch_size, self.seq_length, self.hidden_size))

    def create_and_check_backbone(self, config, pixel_values, labels):
        model = self.backbone_class(config=config).to(torch_device).eval()
        result = model(pixel_values)
        self.parent.assertEqual(len(result.feature_maps), len(config.out_features))
        side = self.image_size // config.patch_size
        shape = [self.batch_size, model.channels[0], side, side]
        self.parent.assertListEqual(list(result.feature_maps[0].shape), shape)
        self.parent.assertEqual(len(model.channels), len(config.out_features))
        config.out_features = None
        model = self.backbone_class(config=config).to(torch_device).eval()
        result = model(pixel_values)
        self.parent.assertEqual(len(result.feature_maps), 1)
        self.parent.assertListEqual(list(result.feature_maps[0].shape), shape)
        self.parent.assertEqual(len(model.channels), 1)
        config.apply_layernorm = False
        config.reshape_hidden_states = False
        model = self.backbone_class(config=config).to(torch_device).eval()
        result = model(pixel_values)
        self.parent.assertEqual(len(result.feature_maps), 1)
        self.parent.assertListEqual(
            list(result.feature_maps[0].shape), [self.batch_size, self.seq_length, self.hidden_size]
        )

    def create_and_check_for_image_classification(self, config, pixel_values, labels):
        config.num_labels = self.type_sequence_label_size
        model = self.classifier_class(config).to(torch_device).eval()
        result = model(pixel_values, labels=labels)
        self.parent.assertEqual(result.logits.shape, (self.batch_size, self.type_sequence_label_size))
        config.num_channels = 1
        model = self.classifier_class(config).to(torch_device).eval()
        pixel_values = floats_tensor([self.batch_size, 1, self.image_size, self.image_size])
        result = model(pixel_values)
        self.parent.assertEqual(result.logits.shape, (self.batch_size, self.type_sequence_label_size))

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values, labels = self.prepare_config_and_inputs()
        inputs_dict = {"pixel_values": pixel_values}
        if self.with_tissue:  # about half of the patches are background, of some images all or none
            side = self.image_size // self.patch_size
            tissue = (floats_tensor([self.batch_size, side, side]) - 0.5).clamp_min(0)
            tissue[0], tissue[1] = 0.0, 1.0
            inputs_dict["tissue_mask"] = tissue
        return config, inputs_dict


class TissueModelTester(MammoDinoModelTester):
    with_tissue = True


class Common(ModelTesterMixin):
    """What the test of Dinov2WithRegisters overrides and skips, but for gradient checkpointing, which is run here."""

    test_resize_embeddings = False
    test_torch_exportable = True
    test_can_init_all_missing_weights_before_2023 = True  # a switch on: the year is read from a header
    harness = MammoDinoModelTester

    def setUp(self):
        self.model_tester = self.harness(self)
        self.config_tester = ConfigTester(
            self, config_class=self.harness.config_class, has_text_modality=False, hidden_size=36
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(reason="does not use inputs_embeds (skipped by the native test)")
    def test_inputs_embeds(self):
        pass

    @unittest.skip(reason="no feedforward chunking (skipped by the native test)")
    def test_feed_forward_chunking(self):
        pass

    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), (nn.Module))
            x = model.get_output_embeddings()
            self.assertTrue(x is None or isinstance(x, nn.Linear))

    def test_model(self):
        self.model_tester.create_and_check_model(*self.model_tester.prepare_config_and_inputs())

    def test_backbone(self):
        self.model_tester.create_and_check_backbone(*self.model_tester.prepare_config_and_inputs())

    def test_for_image_classification(self):
        self.model_tester.create_and_check_for_image_classification(*self.model_tester.prepare_config_and_inputs())


@require_torch
class MammoDinoModelTest(Common, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (MammoDinoModel, MammoDinoForImageClassification, MammoDinoBackbone)
    pipeline_model_mapping = {
        "image-feature-extraction": MammoDinoModel,
        "image-classification": MammoDinoForImageClassification,
    }

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        config = MammoDinoModelTester(None, patch_size=14, image_size=56).get_config()
        for model_class in cls.all_model_classes[:2]:
            folder = f"{TINY_MODELS}/mammodino/{model_class.__name__}"
            model_class(config).save_pretrained(folder)
            MammoDinoImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)

    # the suite asks for timm, which this task does not need
    def test_pipeline_image_feature_extraction(self):
        self.run_task_tests(task="image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self):
        self.run_task_tests(task="image-feature-extraction", dtype="float16")


@require_torch
class MammoDinoTissueModelTest(Common, unittest.TestCase):
    """The same with a tissue mask that drops patches."""

    additional_model_inputs = ["tissue_mask"]  # of the tests that choose inputs by name

    harness = TissueModelTester
    all_model_classes = (MammoDinoModel, MammoDinoForImageClassification, MammoDinoBackbone)


@require_torch
class MammoDinoBackboneTest(unittest.TestCase, BackboneTesterMixin):
    all_model_classes = (MammoDinoBackbone,)
    config_class = MammoDinoConfig
    has_attentions = False  # as the native test says

    def setUp(self):
        self.model_tester = MammoDinoModelTester(self)


@require_torch
class MammoDinoTissueBackboneTest(MammoDinoBackboneTest):
    def setUp(self):
        self.model_tester = TissueModelTester(self)


class MammoDinoImageProcessingTester(ImageProcessingTester):
    def __init__(self, **kwargs):
        kwargs.setdefault("size", {"height": 28, "width": 28})
        kwargs.setdefault("num_channels", 3)
        super().__init__(**kwargs)

    def _get_image_processing_classes(self):
        return {"pil": MammoDinoImageProcessor}

    def expected_output_image_shape(self, images):
        return 1, self.size["height"], self.size["width"]

    def prepare_image_inputs(self, **kwargs):
        """The suite's sizes and types, but a gray breast: noise and color are refused by design."""
        images = super().prepare_image_inputs(**kwargs)
        if kwargs.get("torchify"):
            return [torch.from_numpy(draw(each.shape[1:]))[None].expand_as(each).contiguous() for each in images]
        if kwargs.get("numpify"):
            return [np.repeat(draw(each.shape[:2])[..., None], each.shape[-1], axis=-1) for each in images]
        return [Image.fromarray(draw(each.size[::-1])).convert("RGB") for each in images]


def draw(shape):
    height, width = (int(side) for side in shape)
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (0.42 * height)) ** 2 + (x / (0.7 * width)) ** 2 < 1
    noise = np.random.default_rng(0).normal(size=inside.shape)
    return np.clip(np.where(inside, 130 + 20 * noise, 3 + 0.5 * noise), 0, 255).astype(np.uint8)


@require_torch
@require_vision
class MammoDinoImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MammoDinoImageProcessingTester
    test_cast_dtype = True


for name, reason in DOES_NOT_FIT.items():
    setattr(MammoDinoImageProcessingTest, name, unittest.skip(reason)(lambda self: None))
