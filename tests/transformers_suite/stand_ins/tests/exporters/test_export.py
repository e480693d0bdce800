"""Stands in for transformers' tests/exporters/test_export.py, which its source distribution leaves out: torch.export,
static and dynamic, outputs compared with eager."""

import copy

import torch
from parameterized import parameterized
from transformers import set_seed
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.testing_utils import set_config_for_less_flaky_test, set_model_for_less_flaky_test


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, (tuple, list)):
        return [leaf for each in value for leaf in leaves(each)]
    return []


class ExportTesterMixin:
    test_torch_exportable = True

    def _each(self):
        if not self.test_torch_exportable:
            self.skipTest("test_torch_exportable is False")
        for model_class in self.all_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            set_config_for_less_flaky_test(config)
            config.return_dict = True
            model = model_class(config).eval()
            set_model_for_less_flaky_test(model)
            inputs = self._prepare_for_class(inputs, model_class)
            yield model_class, model, inputs

    @parameterized.expand([("static", False), ("dynamic", True)])
    def test_torch_export(self, name, dynamic):
        for model_class, model, inputs in self._each():
            with self.subTest(model_class.__name__), torch.no_grad():
                expected = leaves(model(**copy.deepcopy(inputs)))
                program = DynamoExporter().export(model, copy.deepcopy(inputs), DynamoConfig(dynamic=dynamic))
                program = getattr(program, "program", program)
                found = leaves(program.module()(**copy.deepcopy(inputs)))
                self.assertEqual(len(found), len(expected))
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
