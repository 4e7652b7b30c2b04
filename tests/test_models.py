"""One loop over every network of the registry, and over a body of each kind that can be borrowed."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fer_nbdev.core import Prediction
from fer_nbdev.export import check_parity, create_onnx, export_model
from fer_nbdev.inference import Predictor
from fer_nbdev.models import count_parameters, create_model, head_parameters, list_models

BODIES = [("timm/mobilenetv3_small_050", dict(img_size=96)), ("timm/tf_efficientnet_lite0", dict(img_size=64, n_in=3)),
          ("timm/vit_tiny_patch16_224", dict(img_size=112)), ("torchvision/resnet18", dict(img_size=224)), ("se_resnet", dict(img_size=64, n_in=3)),
          ("class_balanced", dict(img_size=64)), ("timm/resnet10t.c3_in1k", {}), ("torchvision/mobilenet_v2", {}),
          ("torchvision/squeezenet1_1", dict(img_size=64))]
MODELS = [(arch, {}) for arch in list_models()] + BODIES
every_model = pytest.mark.parametrize("arch, settings", MODELS, ids=[a + "".join(f" {k}={v}" for k, v in s.items()) for a, s in MODELS])


def _create(arch, settings):
    torch.manual_seed(0)
    return create_model(arch, n_classes=5, **settings)


@every_model
def test_shape_and_gradient(arch, settings):
    out = _create(arch, settings)(torch.randn(3, 1, 48, 48))
    assert out.shape == (3, 5)
    model = _create(arch, settings)
    model(torch.randn(3, 1, 48, 48)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    if "/" not in arch:  # a fresh ReLU6 of a borrowed body may let nothing through
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert 0 < sum(p.numel() for p in head_parameters(model)) < count_parameters(model)


@every_model
def test_the_same_answer_twice_and_after_a_save(arch, settings, tmp_path):
    model, faces = _create(arch, settings).eval(), torch.randn(3, 1, 48, 48)
    with torch.no_grad():
        out = model(faces)
        assert torch.equal(model(faces), out)
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        torch.manual_seed(1)
        twin = create_model(arch, n_classes=5, **settings).eval()
        twin.load_state_dict(load_file(tmp_path / "m.safetensors"))
        assert torch.equal(twin(faces), out)
        if "/" not in arch:  # a file of ours, classifier and all
            assert torch.equal(create_model(arch, n_classes=5, pretrained=tmp_path / "m.safetensors", **settings).eval()(faces), out)


@every_model
def test_export_says_what_the_network_says(arch, settings):
    model = _create(arch, settings).eval()
    with torch.no_grad():  # a network that answers the same to every face would pass any parity check
        for m in model.modules():
            if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
                m.momentum = None
        model.train()(torch.randn(16, 1, 48, 48))
        answers = model.eval()(torch.randn(8, 1, 48, 48))
    assert answers.std(0).max() > 1e-3
    check_parity(create_onnx(model), model)


def test_a_folder_of_four_classes_predicts_four_classes(tmp_path):
    classes = ("angry", "happy", "neutral", "sad")
    export_model(create_model("four_class", n_classes=4), tmp_path, classes=classes, weights="float32")
    prediction = Predictor(tmp_path, detector="none").predict(np.full((60, 60), 90, np.uint8))[0]
    assert isinstance(prediction, Prediction) and tuple(prediction.probs) == classes
