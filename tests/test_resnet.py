"""The ResNet18: torchvision's shape and names, published weights under each of their names, frozen parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distset import Exact, InMemory, encode_set
from distset.checkpoints import Checkpoints
from distset.encoders import DeepSets, Features
from distset.optim import Optimisation
from distset.tasks.backbones import resnet18
from distset.tasks.bags import bag_task
from distset.tasks.resnet import ResNet18, load_published
from distset.train import Example, Plan, fit


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return ResNet18(projection=6)


def numbered(state, prefix):
    """As SimCLR's code names them: torchvision's children in a Sequential, the head beside it."""
    places = {"conv1": "0", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    found = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        found[f"{prefix}features.{places[head]}.{rest}" if head in places else f"{prefix}{name}"] = tensor
    return found


def test_it_has_the_parameters_of_torchvision():
    """ResNet18's, by count and shape; InstanceNorm has none of its own."""
    state = ResNet18().state_dict()
    assert len(state) == 20
    assert sum(tensor.numel() for tensor in state.values()) == 11_166_912  # 11,176,512 less the 9,600 of BatchNorm
    names = {f"layer{i}.{j}.conv{k}.weight" for i in range(1, 5) for j in (0, 1) for k in (1, 2)}
    assert set(state) == names | {"conv1.weight"} | {f"layer{i}.0.downsample.0.weight" for i in (2, 3, 4)}
    assert tuple(state["layer3.0.downsample.0.weight"].shape) == (256, 128, 1, 1)


def test_it_computes_the_plain_formula(network):
    """Written out once more, without a module, in float64."""
    w = {name: tensor.double() for name, tensor in network.state_dict().items()}
    images = torch.rand(2, 3, 70, 64, dtype=torch.float64)

    def norm(x):
        centred = x - x.mean((-2, -1), keepdim=True)
        return centred / (centred.square().mean((-2, -1), keepdim=True) + 1e-5).sqrt()

    x = F.max_pool2d(norm(F.conv2d(images, w["conv1.weight"], stride=2, padding=3)).relu(), 3, 2, 1)
    for i in range(1, 5):
        for j in (0, 1):
            stride, block = 2 if i > 1 and j == 0 else 1, f"layer{i}.{j}"
            y = norm(F.conv2d(x, w[f"{block}.conv1.weight"], stride=stride, padding=1)).relu()
            y = norm(F.conv2d(y, w[f"{block}.conv2.weight"], padding=1))
            down = w.get(f"{block}.downsample.0.weight")
            x = (y + (x if down is None else norm(F.conv2d(x, down, stride=stride)))).relu()
    x = F.linear(F.linear(x.mean((2, 3)), w["l1.weight"], w["l1.bias"]).relu(), w["l2.weight"], w["l2.bias"])
    assert torch.allclose(network.double()(images), x, rtol=1e-10, atol=1e-12)
    network.float()


@pytest.mark.parametrize(
    ("style", "prefix", "wrapped", "projection"),
    [
        ("named", "", False, None),
        ("named", "feature_extractor.", True, 6),
        ("numbered", "", True, None),
        ("numbered", "module.", False, 6),
    ],
)
def test_published_weights_load_under_each_of_their_names(network, tmp_path, style, prefix, wrapped, projection):
    state = network.state_dict()
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()} | {"head.0.weight": torch.zeros(2, 512)}
    found = named if style == "named" else numbered(state, prefix)
    torch.save({"state_dict": found, "epoch": 3} if wrapped else found, tmp_path / "model.pth")
    other = ResNet18(projection=projection)
    load_published(other, tmp_path / "model.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "projection", "said"),
    [
        (lambda s: without(s, "layer2.1.conv2.weight"), None, r"lacks layer2.1.conv2.weight and has nothing besides"),
        (lambda s: s | {"layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}, None, "has layer1.2.conv1.weight besides"),
        (lambda s: s | {"bn1.running_mean": torch.zeros(64)}, None, "normalises by BatchNorm; wanted InstanceNorm"),
        (lambda s: s | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, None, r"\(64, 64, 1, 1\), wanted \(64, 64, 3"),
        (lambda s: {n: t for n, t in s.items() if n[0] != "l" or n[1] == "a"}, 6, "lacks l1.bias, .*leave out projection"),
        (lambda s: s, 9, r"has l2.weight of shape \(6, 512\), wanted \(9, 512\)"),
        (lambda s: {"x": torch.zeros(2)}, None, "has 0 first convolutions of 7x7"),
        (lambda s: {"x": 3}, None, "holds dict, wanted a dict of names and tensors"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(network, tmp_path, monkeypatch, change, projection, said):
    (tmp_path / "model.pth").touch()
    monkeypatch.setattr(torch, "load", lambda *_, **__: change(dict(network.state_dict())))
    with pytest.raises(ValueError, match=said):
        load_published(ResNet18(projection=projection), tmp_path / "model.pth")


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="weights: found no file"):
        resnet18((3, 64, 64), weights=str(tmp_path / "nowhere.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read without running code"):
        resnet18((3, 64, 64), weights=str(tmp_path / "text.pth"))
    with pytest.raises(ValueError, match="got images of 32 x 40, wanted at least 33 x 33"):
        resnet18((3, 32, 40))


def test_its_features_do_not_depend_on_the_chunk():
    """InstanceNorm looks at one image, so the gradient through all patches is the same for any chunking."""
    torch.manual_seed(0)
    encoder = Features(resnet18((3, 33, 33)).double(), DeepSets(torch.nn.Linear(512, 2).double(), "mean"))
    images = torch.randint(0, 256, (3, 3, 33, 33), dtype=torch.uint8)
    for pixels in encoder.modules():
        if hasattr(pixels, "mean") and isinstance(pixels.mean, torch.Tensor):
            pixels.double()
    grads = []
    for size in (3, 2):
        encoder.zero_grad()
        value = encode_set(encoder, InMemory(images, size, element_ndim=3), grad=Exact(), seed=0)
        value.square().sum().backward()
        grads.append((value.detach(), encoder.extractor[1].conv1.weight.grad.clone()))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-12)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-9, atol=1e-12)


MODEL = {"_target_": "distset.tasks.bag_models.umbc_mil", "slots": 2, "width": 8, "heads": 1}
BACKBONE = {"_target_": "distset.tasks.backbones.cnn", "widths": [4], "dim": 6}


def task_of(**how):
    how = {"backbone": BACKBONE, "element_shape": (3, 8, 8)} | how
    return bag_task(model=MODEL, grad=None, classes=["a", "b"], **how)


@pytest.mark.parametrize(("freeze", "moves"), [(None, {"backbone", "head"}), ("head", {"backbone"}), ("backbone", {"head"})])
def test_parts_can_be_frozen(freeze, moves):
    task = task_of(freeze=freeze)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    images = torch.randint(0, 256, (6, 5, 3, 8, 8), dtype=torch.uint8)
    bags = [Example(InMemory(x, 2, element_ndim=3, name=str(i)), i % 2) for i, x in enumerate(images)]
    fit(task, bags, plan=Plan(epochs=1, batch=3))
    moved = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"backbone" if ".extractor." in name else "head" for name in moved} == moves


def test_weights_to_begin_with(tmp_path):
    """Those of the same model; or of one that had this backbone's features for elements."""
    donor = task_of(seed=5)
    heads = task_of(backbone=None, element_shape=(6,), seed=7)
    for name, task in (("whole", donor), ("heads", heads)):
        images = torch.randint(0, 256, (4, 3, *task_shape(task)), dtype=torch.uint8)
        bags = [Example(InMemory(x.float() if task is heads else x, element_ndim=x.dim() - 1, name=str(i)), i % 2)
                for i, x in enumerate(images)]  # fmt: skip
        fit(task, bags, plan=Plan(epochs=1, batch=4), checkpoints=Checkpoints(tmp_path / name / "checkpoints"))
    begun = task_of(start=str(tmp_path / "whole")).model.state_dict()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in donor.model.state_dict().items())
    begun, own = task_of(start=str(tmp_path / "heads")).model.state_dict(), task_of().model.state_dict()
    theirs = heads.model.state_dict()
    for name, tensor in begun.items():
        source = own[name] if ".extractor." in name else theirs[name.replace("encoder.encoder.", "encoder.", 1)]
        assert torch.equal(tensor, source), name
    with pytest.raises(ValueError, match="found no file"):
        task_of(start=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"start: .*state.pt"):
        task_of(backbone={**BACKBONE, "dim": 7}, start=str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="freeze: got 'all'"):
        task_of(freeze="all")
    with pytest.raises(ValueError, match=r"freeze: got 'head', wanted .* a backbone beside it"):
        task_of(backbone=None, element_shape=(6,), freeze="head")


def task_shape(task):
    return (3, 8, 8) if any(".extractor." in name for name in task.model.state_dict()) else (6,)


def test_the_cosine_ends_at_its_floor():
    recipe = Optimisation(lr=1.0, warmup=0.1, floor=0.1)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[55] == pytest.approx(0.55, abs=0.02)
    with pytest.raises(ValueError, match="floor: got 2"):
        Optimisation(floor=2)
