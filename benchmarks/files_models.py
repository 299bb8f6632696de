"""Models whose graphs are evolved, saved, and loaded in a process of their own; a part of `benchmarks/files.py`.

    python benchmarks/files_models.py write NAME FOLDER
    python benchmarks/files_models.py read NAME FOLDER

The first evolves a model five times, by shrinks, growths and changes of basis, and saves it in each safe form, with its
outputs; the second makes the model anew, with other weights, loads the files and compares.
"""

from __future__ import annotations

import copy
import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from fxwidth import FxwidthError
from fxwidth.runtime.pytrees import deep_tensors

RESIZES, AT_ONCE = 5, 4
TORCHVISION = (
    *("resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("vit", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "swin_t", "densenet121"),
)
TRANSFORMERS = ("llama", "qwen3", "gpt2", "bert", "t5", "vit_hf")
_IMAGE = 64


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a model with random weights in eval mode, and inputs for it."""
    if name in TORCHVISION:
        models = importlib.import_module("torchvision.models")
        images = (torch.randn(4, 3, _IMAGE, _IMAGE, generator=torch.Generator().manual_seed(1)),)
        if name == "vit":
            made = models.VisionTransformer(_IMAGE, 16, 3, 4, 96, 192, num_classes=10)
        else:
            made = models.get_model(name, weights=None, num_classes=10)
        return _set_apart(made), images
    return _transformer(name)


def _transformer(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    library: Any = importlib.import_module("transformers")
    small = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = torch.randint(0, 96, (4, 10), generator=torch.Generator().manual_seed(1))
    makers: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: library.LlamaForCausalLM(library.LlamaConfig(**small, **heads, use_cache=False)),
        "qwen3": lambda: library.Qwen3ForCausalLM(library.Qwen3Config(**small, **heads, head_dim=12, use_cache=False)),
        "gpt2": lambda: library.GPT2LMHeadModel(
            library.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=32, use_cache=False)
        ),
        "bert": lambda: library.BertModel(library.BertConfig(**small, num_attention_heads=4)),
        "t5": lambda: library.T5EncoderModel(
            library.T5Config(vocab_size=96, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4)
        ),
        "vit_hf": lambda: library.ViTModel(
            library.ViTConfig(
                hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                patch_size=8,
            )
        ),
    }  # fmt: skip
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return _set_apart(makers[name]()), (images if name == "vit_hf" else ids,)


def _set_apart(model: nn.Module) -> nn.Module:
    """Give norms values as training leaves them."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "var" in name else 0.1 * torch.randn_like(tensor))
    return model.eval()


def evolved(name: str) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return a graph that has been resized five times, some groups each time."""
    torch.manual_seed(0)
    model, inputs = build(name)
    choices = random.Random(name)
    gm = fxwidth.trace(model, inputs)
    for number in range(RESIZES):
        # Groups of linear streams and heads, which change their bases, come in turn with all others.
        free = fxwidth.analyze(gm).free
        chosen = choices.sample(free, min(len(free), AT_ONCE))
        plan = {}
        for group in chosen:
            step = max(1, group.width // 8)
            width = group.width + (step if choices.random() < 0.4 else -step)
            plan[group.name] = max(width, group.least.width, 1)
        shrinks = any(plan[group.name] < group.width for group in chosen)
        fxwidth.resize(
            gm, plan, data=[inputs] if shrinks else None, exact=False, recalibrate=shrinks and number % 2 > 0
        )
    return gm.eval(), inputs


def answers(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the outputs for two batches."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for rows in (4, 2):
            values = deep_tensors(gm(*(one[:rows] for one in copy.deepcopy(inputs))))
            found |= {f"{rows} {place}": value.clone().contiguous() for place, value in enumerate(values)}
    return found


def write(name: str, folder: Path) -> dict[str, Any]:
    """Evolve a model, and save it with its outputs; return what was done."""
    gm, inputs = evolved(name)
    fxwidth.save(gm, folder / f"{name}.safetensors")
    try:
        fxwidth.save(gm, folder / f"{name}.pt2")
        exported = "written"
    except FxwidthError as error:
        exported = str(error)
    save_file(answers(gm, inputs), folder / f"{name}.answers")
    resizes = fxwidth.report(gm).resizes
    changes = [pair for record in resizes for pair in record["widths"].values()]
    return {
        "shrunk": sum(new < old for old, new in changes),
        "grown": sum(new > old for old, new in changes),
        "rotated": sum(len(record["rotated"]) for record in resizes),
        "bytes": (folder / f"{name}.safetensors").stat().st_size,
        "exported": exported,
    }


def read(name: str, folder: Path) -> dict[str, Any]:
    """Load what was saved, and return what its outputs are beside those of then."""
    torch.manual_seed(5)
    model, inputs = build(name)
    wanted = load_file(folder / f"{name}.answers")
    found = {"tensors": _beside(wanted, lambda: fxwidth.load(folder / f"{name}.safetensors", model, inputs), inputs)}
    if (folder / f"{name}.pt2").exists():
        found["exported"] = _beside(wanted, lambda: fxwidth.load(folder / f"{name}.pt2"), inputs)
    return found


def _beside(wanted: dict[str, Tensor], load: Callable[[], fx.GraphModule], inputs: tuple[Any, ...]) -> str:
    try:
        gm = load().eval()
    except FxwidthError as error:
        return f"refused: {error}"
    now = answers(gm, inputs)
    if now.keys() != wanted.keys():
        return "other outputs"
    if all(torch.equal(now[key], value) for key, value in wanted.items()):
        return "equal"
    return f"off by {max(float((now[key] - value).abs().max()) for key, value in wanted.items()):.1e}"


if __name__ == "__main__":
    done = {"write": write, "read": read}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    print(json.dumps(done))
