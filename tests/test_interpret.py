"""Do maps of the face tell the truth for every network? And the parts of `interpret` that are too slow for its notebook.

The networks have the structure of the registry at a fraction of the width. Each learns drawn faces, half of them with a small
chessboard at a random place, and nothing else that tells them apart; then its maps have to peak on the chessboard.
"""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")
import torch.nn.functional as F

from fer_nbdev.data import synthetic_faces
from fer_nbdev.interpret import PROJECTIONS, default_layers, features, grad_cam, map_layers, occlusion_map, open_network, project_features
from fer_nbdev.models import create_model, list_models

SIZE = 10
NARROW = {
    "class_balanced": dict(blocks=((8, 8), (16, 16), (32, 32), (32, 32)), dropout=(0.,) * 4, hidden=(32, 32), head_dropout=(0., 0.)),
    "emotion_detector": dict(blocks=((8,), (16,), (32,), (32,)), hidden=(32,), head_dropout=(0.,)),
    "four_class": dict(blocks=((8, 8), (16, 16), (32, 32)), dropout=(0.,) * 3, hidden=(32, 32), head_dropout=(0., 0.)),
    "realtime_net": dict(blocks=((8, 8), (16, 16), (32, 32), (32, 32)), head_dropout=(0.,)),
    "realtime_senet": dict(stem=8, widths=(8, 16, 32, 32), blocks=(1, 1, 1, 1), dropout=0.),
    "se_resnet": dict(stem=8, widths=(16, 32, 32), blocks=(1, 1, 1), dropout=0.),
    "sequential": dict(blocks=((8, 16), (32,), (32,)), dropout=(0.,) * 3, hidden=(64,), head_dropout=(0.,)),
}
BORROWED = ["timm/resnet18", "timm/mobilenetv3_small_100", "timm/convnext_atto", "timm/vit_tiny_patch16_224", "torchvision/resnet18", "torchvision/swin_t"]


def plant(n, seed):
    "Faces, whether a chessboard is on them, and the upper left corner of each."
    faces, rng = synthetic_faces(n, seed).pixels, np.random.default_rng(seed)
    corner = rng.integers(0, 48 - SIZE, (n, 2))
    board = np.kron(np.indices((SIZE // 2, SIZE // 2)).sum(0) % 2 * 255, np.ones((2, 2)))
    for face, (top, left) in zip(faces[1::2], corner[1::2]):
        face[top:top + SIZE, left:left + SIZE] = board
    return faces, np.arange(n) % 2, corner


def train(model, epochs=14, bs=32):
    "The network, and its accuracy on faces that it has not seen, where it reached 97% or was stopped."
    torch.manual_seed(0)
    (faces, label, _), (others, truth, _) = plant(320, 0), plant(100, 1)
    network = open_network(model, classes=("plain", "chessboard"))
    x, y, opt = network.prepare(faces), torch.from_numpy(label), torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(bs):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        accuracy = (network.predict_faces(others).argmax(1) == truth).mean()
        if accuracy >= .97:
            break
    model.eval()
    return network, accuracy


def hits(maps, corner):
    peak = np.stack(np.unravel_index(maps.reshape(len(maps), -1).argmax(1), maps.shape[1:]), 1) - corner
    return ((peak >= 0) & (peak < SIZE)).all(1).mean()


@pytest.mark.parametrize("arch", list_models())
def test_maps_peak_on_what_was_planted(arch):
    torch.manual_seed(0)
    network, accuracy = train(create_model(arch, n_classes=2, **NARROW.get(arch, {})))
    assert accuracy >= .95, f"{arch} did not learn: {accuracy:.0%}"
    faces, label, corner = plant(60, 2)
    seen = np.flatnonzero((label == 1) & (network.predict_faces(faces).argmax(1) == 1))
    assert hits(grad_cam(network, faces[seen], "chessboard"), corner[seen]) >= .9
    assert hits(occlusion_map(network, faces[seen[:10]], "chessboard"), corner[seen[:10]]) >= .9


@pytest.mark.parametrize("arch", list_models() + BORROWED)
def test_every_network_gives_maps_and_is_left_as_it_was(arch):
    torch.manual_seed(0)
    model, faces = create_model(arch).train(), synthetic_faces(3).pixels
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    for method in ("layercam", "gradcam"):
        names = default_layers(model, method)
        assert set(names) <= set(map_layers(model)) and 1 <= len(names) <= 2
        maps = grad_cam(model, faces, "happy", method=method, bs=2)
        assert maps.shape == (3, 48, 48) and maps.dtype == np.float32 and np.isfinite(maps).all()
        assert maps.min() >= 0 and set(maps.max((1, 2)).round(4)) <= {0., 1.}
        assert np.array_equal(maps, grad_cam(model, faces, 3, method=method, bs=2))
        np.testing.assert_allclose(maps, np.concatenate([grad_cam(model, f[None], 3, method=method) for f in faces]), atol=5e-3)
    assert grad_cam(model, faces).any()
    lost = occlusion_map(model, faces[:1], size=24, stride=24, scale=False)
    assert lost.shape == (1, 48, 48) and -1 <= lost.min() < lost.max() <= 1
    assert features(model, faces).shape[0] == 3
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def learned():
    "A network that knows the drawn faces a little, and ten of them."
    torch.manual_seed(0)
    table = synthetic_faces(210)
    network = open_network(create_model("fast_resnet", widths=(16, 32), blocks=(1, 1), dropout=0.))
    x, y, opt = network.prepare(table.pixels), torch.from_numpy(table.emotion).long(), torch.optim.AdamW(network.model.parameters(), .01)
    for rows in torch.randperm(210).repeat(4).split(35):
        F.cross_entropy(network.model(x[rows]), y[rows]).backward()
        opt.step()
        opt.zero_grad()
    network.model.eval()
    return network, table.pixels[:10]


def test_gradcam_behind_a_pool_is_cam(learned):
    "Behind an average pool and a linear layer Grad-CAM is the last maps weighted by the classifier (Zhou et al. 2016)."
    network, faces = learned
    model, x, target = network.model, network.prepare(faces), torch.arange(10) % 7
    with torch.no_grad():
        maps, w, p = model.stages(x), model.head[-1].weight, model(x).softmax(1)
        cam = torch.einsum("nc,nchw->nhw", w[target] - p @ w, maps).clamp(min=0)
        cam = F.interpolate(cam[:, None], (48, 48), mode="bilinear")[:, 0]
        cam /= cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
    assert cam.any()
    np.testing.assert_allclose(grad_cam(network, faces, target.numpy(), method="gradcam", layer="stages"), cam.numpy(), atol=1e-4)


def test_layercam_is_its_formula(learned):
    "One layer, summed over the channels by a loop."
    network, faces = learned
    model, x, target = network.model, network.prepare(faces), torch.arange(10) % 7
    maps = model.stages[:2](x).detach().requires_grad_()
    slopes = torch.autograd.grad(model.head(model.stages[2](maps)).log_softmax(1)[range(10), target].sum(), maps)[0]
    summed = np.zeros((10, 24, 24))
    for c in range(maps.shape[1]):
        summed += np.maximum(slopes[:, c].numpy(), 0) * maps[:, c].detach().numpy()
    large = F.interpolate(torch.tensor(summed).clamp(min=0)[:, None], (48, 48), mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(grad_cam(network, faces, target.numpy(), layer="stages.1"), large / large.max((1, 2), keepdims=True), atol=1e-4)


@pytest.mark.parametrize("size, stride", [(16, 12), (12, 12)])
def test_occlusion_is_what_loops_over_positions_find(learned, size, stride):
    network, faces = learned

    def by_loops(face, c):
        p, lost, n = network.predict_faces(face[None])[0, c], np.zeros((48, 48)), np.zeros((48, 48))
        for top in range(stride - size, 48, stride):
            for left in range(stride - size, 48, stride):
                box = slice(max(top, 0), top + size), slice(max(left, 0), left + size)
                covered = face.copy()
                covered[box] = 130
                lost[box] += p - network.predict_faces(covered[None])[0, c]
                n[box] += 1
        return lost / n

    raw = occlusion_map(network, faces[3:5], ["happy", 4], size=size, stride=stride, scale=False)
    np.testing.assert_allclose(raw, [by_loops(faces[3], 3), by_loops(faces[4], 4)], atol=1e-5)
    scaled = raw.clip(0) / raw.clip(0).max((1, 2), keepdims=True)
    np.testing.assert_allclose(occlusion_map(network, faces[3:5], ["happy", 4], size=size, stride=stride), scaled, atol=1e-5)


def test_a_frozen_network_gives_maps_too(learned):
    _, faces = learned
    model = create_model("se_resnet", stem=8, widths=(16, 32), blocks=(1, 1)).train().requires_grad_(False)
    assert np.array_equal(grad_cam(model, faces[:3], "happy", bs=2), grad_cam(model, faces[:3], [3, "happy", 3], bs=2))
    assert grad_cam(model, faces[:3], "happy").any() and model.training


@pytest.mark.parametrize("arch", list_models() + BORROWED[:3])
def test_features_are_what_the_last_layer_multiplies(arch):
    model = create_model(arch).eval()
    faces, last = synthetic_faces(5).pixels, [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    x = torch.from_numpy(features(model, faces, bs=2))
    with torch.no_grad():
        torch.testing.assert_close(x @ last.weight.T + last.bias, model(open_network(model).prepare(faces)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", PROJECTIONS)
def test_projections_keep_clusters_apart_and_repeat(method):
    if method == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, .1, (30, 16)) + 5 * np.eye(16)[i] for i in range(3)])
    points = project_features(x, method)
    assert points.shape == (90, 2) and np.array_equal(points, project_features(x, method))
    centres = points.reshape(3, 30, 2).mean(1)
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(1)
    assert np.array_equal(nearest, np.arange(90) // 30)


@pytest.mark.parametrize("fill", [-1, 300])
def test_the_square_of_occlusion_is_a_gray(learned, fill):
    with pytest.raises(ValueError, match=f"fill={fill}"):
        occlusion_map(learned[0], np.zeros((1, 48, 48), np.uint8), fill=fill)
