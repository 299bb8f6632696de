"""Files under bad luck and ill will: damaged at random, made to run code or to claim sizes, written while killed.

What is loaded from a damaged file is equal to the bit to what was saved, or it is refused; and no code runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.serialization import tensor_files
from fxwidth.serialization.tensor_files import write_tensors

FORMS = (".safetensors", ".pt2")
# What Python's audit hooks tell of where code is looked up by a file, or the machine is acted upon.
_EVENTS = frozenset(
    {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"}
)


def network(width: int = 24) -> nn.Module:
    """Return a small network with norms of both kinds, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 12), nn.BatchNorm1d(12), nn.ReLU(),
            nn.Linear(12, 3),
        ).eval()  # fmt: skip


def inputs() -> Tensor:
    """Return inputs for it."""
    return torch.linspace(-1, 1, 30).view(5, 6)


def graph(width: int = 24, *plans: dict[str, int]) -> fx.GraphModule:
    """Return its graph, resized by some plans."""
    gm = fxwidth.trace(network(width), inputs())
    for plan in plans or ({"0": width // 2}, {"3": 15}, {"0": width // 2 + 1, "3": 9}):
        fxwidth.resize(gm, plan, selection="magnitude")
    return gm


def load(path: Path, width: int = 24) -> fx.GraphModule:
    """Load a file of it."""
    return fxwidth.load(path, network(width), inputs()) if path.suffix == ".safetensors" else fxwidth.load(path)


def is_equal(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Tell whether two graphs have the same state, history and outputs, to the bit."""
    state, wanted = one.state_dict(), other.state_dict()
    histories = [[record["widths"] for record in fxwidth.report(gm).resizes] for gm in (one, other)]
    return (
        state.keys() == wanted.keys()
        and all(torch.equal(state[name], wanted[name]) for name in state)
        and histories[0] == histories[1]
        and torch.equal(one(inputs()), other(inputs()))
    )


def damaged(content: bytes, choices: random.Random) -> bytes:
    """Return a file with one byte changed, or a region cut out, zeroed or moved."""
    kind = choices.choice(["flip", "flip", "cut", "zero", "end"])
    start = choices.randrange(len(content))
    length = choices.randint(1, max(1, len(content) // choices.choice([2, 20, 200])))
    if kind == "flip":
        return content[:start] + bytes([content[start] ^ (1 << choices.randrange(8))]) + content[start + 1 :]
    if kind == "cut":
        return content[:start] + content[start + length :]
    if kind == "zero":
        end = min(start + length, len(content))
        return content[:start] + bytes(end - start) + content[end:]
    return content[:start]


def outcome(path: Path, saved: fx.GraphModule) -> str:
    """Return what comes of loading a file: "refused", "equal", or what is wrong with it."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        gm = fxwidth.load(path, model, inputs()) if path.suffix == ".safetensors" else fxwidth.load(path)
    except FxwidthError:
        same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return "refused" if same else "refused, with the model changed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "equal" if is_equal(gm, saved) else "other than what was saved"


_SEEN: list[str] = []
_HOOKED: list[bool] = []


@contextmanager
def watching_code() -> Iterator[list[str]]:
    """Yield a list that takes what code a file has looked up or run meanwhile."""
    if not _HOOKED:
        # A hook cannot be taken away.
        sys.addaudithook(lambda event, arguments: _SEEN.append(f"{event} {arguments}") if event in _EVENTS else None)
        _HOOKED.append(True)
    start, seen = len(_SEEN), list[str]()
    yield seen
    seen += _SEEN[start:]


def _record(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["fxwidth.record"])
    return found


def _rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the record of a file, and give it the digest of its new bytes."""
    record, tensors = _record(path), load_file(path)
    change(record)
    write_tensors(path, tensors, {"fxwidth.record": json.dumps(record)})


def _with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a file, and give it the digest of its new bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with path.open("rb+") as file:
        place = tensor_files._place_of_digest(file)
        digest = tensor_files._digest(file, place)
        file.seek(place)
        file.write(digest.encode())


def _with_entries(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the entries of an archive, and give it the digests of the new ones."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    signed = json.loads(entries.pop("archive/extra/fxwidth.json"))
    model = json.loads(entries["archive/models/model.json"])
    told = {"model": model, "entries": entries}
    change(told)
    entries["archive/models/model.json"] = json.dumps(model).encode()
    text = json.loads(signed["text"])
    text["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in entries.items()}
    new = json.dumps(text)
    entries["archive/extra/fxwidth.json"] = json.dumps(
        {"text": new, "sha256": hashlib.sha256(new.encode()).hexdigest()}
    ).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


_HUGE = 2**40


def _huge_plan(record: dict[str, Any]) -> None:
    pairs = record["history"][0]["dict"]
    widths = next(value for key, value in pairs if key == "widths")
    widths["dict"][0][1][1] = 10**6


def _resized(payload: str) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        name = f"archive/data/{payload}"
        config = json.loads(told["entries"][name])
        first = next(iter(config["config"].values()))
        told["entries"][f"archive/data/weights/{first['path_name']}"] = b""
        first["tensor_meta"]["sizes"] = [{"as_int": _HUGE}]
        told["entries"][name] = json.dumps(config).encode()

    return change


def _pickled(told: dict[str, Any]) -> None:
    config = json.loads(told["entries"]["archive/data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    told["entries"][f"archive/data/weights/{first['path_name']}"] = pickle_bomb()
    told["entries"]["archive/data/weights/model_weights_config.json"] = json.dumps(config).encode()


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def pickle_bomb() -> bytes:
    """Return a pickle that runs a command when it is read."""
    import pickle

    return pickle.dumps(_Bomb())


def _nodes(told: dict[str, Any]) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = told["model"]["graph_module"]["graph"]["nodes"]
    return nodes


def _sized(told: dict[str, Any]) -> dict[str, Any]:
    values = told["model"]["graph_module"]["graph"]["tensor_values"]
    return next(size for one in values.values() for size in one["sizes"] if "as_expr" in size)["as_expr"]  # type: ignore[no-any-return]


def _signature(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = told["model"]["graph_module"]["module_call_graph"][0]["signature"]
    return found


_READS = "torch.ops.aten.from_file.default"
_IN_CODE = "__import__('os').system('true')"


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**entries, "archive/extra/zeros": bytes(2**26)}.items():
            archive.writestr(name, content)


# By name: the form, and what is done to a file. All are refused, for what they claim or what they would run.
BOMBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "header longer than the file": (
        ".safetensors", lambda path: path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:]),
    ),
    "huge shape": (
        ".safetensors", lambda path: _with_header(path, lambda h: h["0.weight"].update(shape=[_HUGE, _HUGE])),
    ),
    "huge offsets": (
        ".safetensors", lambda path: _with_header(path, lambda h: h["0.weight"].update(data_offsets=[0, _HUGE])),
    ),
    "negative shape": (
        ".safetensors", lambda path: _with_header(path, lambda h: h["0.weight"].update(shape=[-1, -72])),
    ),
    "deep header": (
        ".safetensors",
        lambda path: path.write_bytes((40000).to_bytes(8, "little") + b"[" * 40000 + path.read_bytes()[-4000:]),
    ),
    "huge widths on the way": (".safetensors", lambda path: _rewritten(path, _huge_plan)),
    "a record that is none": (".safetensors", lambda path: _rewritten(path, lambda r: r.update(history=7))),
    "another class of value": (
        ".safetensors", lambda path: _rewritten(path, lambda r: r.update(history={"reduce": ["os.system", "true"]})),
    ),
    "compressed entries": (".pt2", _compressed),
    "huge weight without bytes": (
        ".pt2", lambda path: _with_entries(path, _resized("weights/model_weights_config.json")),
    ),
    "a pickled weight": (".pt2", lambda path: _with_entries(path, _pickled)),
    "pickled samples": (
        ".pt2",
        lambda path: _with_entries(
            path, lambda told: told["entries"].update({"archive/data/sample_inputs/model.pt": pickle_bomb()})
        ),
    ),
    "a function of torch that is no operator": (
        ".pt2", lambda path: _with_entries(path, lambda told: _nodes(told)[0].update(target="torch.os.system")),
    ),
    "an operator that reads files": (
        ".pt2",
        lambda path: _with_entries(path, lambda told: _nodes(told)[0].update(target=_READS)),
    ),
    "code in a condition": (
        ".pt2", lambda path: _with_entries(path, lambda told: told["model"].update(guards_code=[_IN_CODE])),
    ),
    "code in a size": (".pt2", lambda path: _with_entries(path, lambda told: _sized(told).update(expr_str=_IN_CODE))),
    "code in a name": (
        ".pt2",
        lambda path: _with_entries(path, lambda told: _signature(told).update(forward_arg_names=[f"x={_IN_CODE}"])),
    ),
    "a module to import": (
        ".pt2",
        lambda path: _with_entries(
            path,
            lambda told: _signature(told).update(
                in_spec=_signature(told)["in_spec"].replace('"null"', '"{\\"__enum__\\": true}"')
            ),
        ),
    ),
}  # fmt: skip


def forked(work: Callable[[], object]) -> int:
    """Run something in a child process, which ends without a word; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a child process, and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_in_saving(gm: fx.GraphModule, path: Path, delay: float, *, waits: bool = False) -> bool:
    """Have a child save a graph again and again, kill it after a while, and tell whether it was in writing.

    Args:
        gm: the graph.
        path: the file.
        delay: seconds until the kill.
        waits: whether they begin when there is a file beside, which is when it begins to write.
    """
    folder = path.parent
    before = set(folder.iterdir())

    def work() -> None:
        while True:
            fxwidth.save(gm, path)

    child = forked(work)
    while waits and set(folder.iterdir()) == before:
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    ended(child)
    left = set(folder.iterdir()) - before - {path}
    for file in left:
        file.unlink()
    return bool(left)
