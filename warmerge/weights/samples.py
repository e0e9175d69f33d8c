"""A small sample of every tensor: enough to know a checkpoint again, and to see a member that does not belong.

The sample is the middle 4 KiB of each tensor, so it does not depend on how a checkpoint is cut into shards; heads,
which are small and matter most, are read whole. Checkpoints that differ elsewhere alone, such as in the embeddings of a
few tokens, have the same sample and the same fingerprint; `content_digest` tells them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from warmerge.errors import Finding, plain
from warmerge.weights.checkpoint import Checkpoint, Stored, Tensor
from warmerge.weights.folder import LocalFolder, read_bytes
from warmerge.weights.heads import is_head
from warmerge.weights.kernels import TORCH_DTYPE
from warmerge.weights.remote.read_ahead import Piece, read_pieces
from warmerge.weights.safetensors_format import AVERAGED, BITS

SAMPLE_BYTES = 4096
# Cosine of two heads: >= .9 for heads that were trained from one probe, about 0 for heads drawn at random.
SHARED_HEAD_COSINE = 0.5
# So many values of a sample's body at most, 8 MB: all of the middles of some 500 tensors, of more tensors less of each.
BODY_VALUES = 1 << 20
_AT_ONCE = 2048
# Heads are read whole up to 256 MB of all of them: a file may call anything a head.
_HEAD_BYTES = 1 << 28
# |a - b| / |a| over a sample: some per cent between fine-tunings of one model, 1.4 between unrelated models.
RELATED_DISTANCE = 0.5
# A member this many times further from the mean of the others than is usual among them.
OUTLIER_RATIO = 3.0


@dataclass(frozen=True)
class Sample:
    """`fingerprint` (hex) names the contents; `body` (n,) and `heads` (name -> flat) are float64 values."""

    fingerprint: str
    body: torch.Tensor
    heads: dict[str, torch.Tensor]


def read_sample(checkpoint: Checkpoint) -> Sample:
    """Reads some 4 KiB of each tensor (of an adapter's factors too), and heads whole."""
    digest, body, heads = hashlib.sha256(), [], {}
    tensors = sorted(checkpoint.tensors.items())
    whole = _whole(tensors)
    share, read = max(1, BODY_VALUES // max(1, len(tensors))), _pieces(tensors, whole)
    for name, tensor in tensors:
        for part in tensor.parts:
            data = next(read)
            digest.update(f"{name}\0{part.dtype}\0{part.shape}\0".encode(errors="surrogatepass") + data)
            if part is tensor.parts[0] and part.dtype in AVERAGED:
                body.append(_values(data[: share * BITS[part.dtype] // 8], part))
        if name in whole:
            heads[name] = _values(next(read), tensor.parts[0])
            digest.update(heads[name].numpy().tobytes())
    return Sample(digest.hexdigest(), torch.cat(body) if body else torch.zeros(0, dtype=torch.float64), heads)


def _pieces(tensors: Sequence[tuple[str, Tensor]], whole: Mapping[str, Piece]) -> Iterator[bytes]:
    """The middles of each tensor's parts and, of heads, the whole; of some tensors at a time, so that few wait."""
    for begin in range(0, len(tensors), _AT_ONCE):
        some = tensors[begin : begin + _AT_ONCE]
        both = ((map(_middle, tensor.parts), [whole[name]] if name in whole else []) for name, tensor in some)
        yield from read_pieces([piece for middles, head in both for piece in (*middles, *head)])


def content_digest(checkpoint: Checkpoint) -> str:
    """A digest (hex) of every byte of its weights, wherever they lie; of files that are elsewhere, of their version."""
    digest = hashlib.sha256()
    for folder, name in checkpoint.weight_files:
        digest.update(f"{name}\0".encode(errors="surrogatepass"))
        if not isinstance(folder, LocalFolder):
            digest.update(str(folder.identity).encode(errors="surrogatepass"))
            continue
        with (folder.path / name).open("rb") as file:
            while data := file.read(1 << 22):
                digest.update(data)
    return digest.hexdigest()


def _values(data: bytes, part: Stored) -> torch.Tensor:
    """(n,) float64."""
    if not data:
        return torch.zeros(0, dtype=torch.float64)
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPE[part.dtype]).double()


def _middle(part: Stored) -> Piece:
    count = min(part.numel, SAMPLE_BYTES * 8 // BITS[part.dtype])
    width = part.nbytes // max(part.numel, 1)
    return Piece(part.folder, part.file, part.offset + (part.numel - count) // 2 * width, count * width)


def _whole(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Piece]:
    """All of each head, as long as they are small together."""
    found, total = {}, 0
    for name, tensor in tensors:
        if is_head(name) and len(tensor.parts) == 1 and tensor.dtype in AVERAGED:
            (part,) = tensor.parts
            total += part.nbytes
            if total <= _HEAD_BYTES:
                found[name] = Piece(part.folder, part.file, part.offset, part.nbytes)
    return found


def doubts(members: Sequence[Checkpoint], samples: Sequence[Sample]) -> list[Finding]:
    """Warnings: heads that share no start, members that share no pre-training, one member far from the others."""
    return [*_heads(members, samples), *_distances(members, samples)]


def same_contents(members: Sequence[Checkpoint], samples: Sequence[Sample]) -> list[Finding]:
    """Members with the same weights, byte for byte: one checkpoint under two names, perhaps in other shards.

    Only members whose samples are equal are read in full.
    """
    findings: list[Finding] = []
    seen: dict[str, Checkpoint] = {}
    for member, sample in zip(members, samples, strict=True):
        first = seen.setdefault(sample.fingerprint, member)
        if first is not member and _same_bytes(first, member):
            what = f"has the same weights as {plain(first.label)}; --allow-duplicates counts them twice"
            findings.append(Finding(member.label, what))
    return findings


def _same_bytes(a: Checkpoint, b: Checkpoint, block: int = 1 << 22) -> bool:
    return all(
        read_bytes(one.folder, one.file, one.offset + start, min(block, one.nbytes - start))
        == read_bytes(two.folder, two.file, two.offset + start, min(block, one.nbytes - start))
        for name in a.tensors
        for one, two in zip(a.tensors[name].parts, b.tensors[name].parts, strict=True)
        for start in range(0, one.nbytes, block)
    )


def _heads(members: Sequence[Checkpoint], samples: Sequence[Sample]) -> list[Finding]:
    lowest: tuple[float, str, int, int] | None = None
    for name in samples[0].heads:
        for i in range(len(members)):
            for j in range(i):
                a, b = samples[i].heads.get(name), samples[j].heads.get(name)
                if a is None or b is None or a.shape != b.shape or len(a) < 16:
                    continue
                cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
                if lowest is None or cosine < lowest[0]:
                    lowest = (cosine, name, i, j)
    if lowest is None or not lowest[0] < SHARED_HEAD_COSINE:
        return []
    cosine, name, i, j = lowest
    what = (
        f"has cosine {cosine:.2f} with {plain(members[j].label)}'s: these heads look independently drawn. Averaging "
        "needs members that started from one probed head (WARM, section 3.2)"
    )
    return [Finding(members[i].label, what, name)]


def _distances(members: Sequence[Checkpoint], samples: Sequence[Sample]) -> list[Finding]:
    bodies = [sample.body for sample in samples]
    if len({len(body) for body in bodies}) > 1 or not len(bodies[0]) or len(bodies) < 2:
        return []
    stack = torch.stack(bodies)
    findings = []
    apart = [float((row - stack[0]).norm() / stack[0].norm().clamp_min(1e-300)) for row in stack]
    for member, distance in zip(members, apart, strict=True):
        if distance > RELATED_DISTANCE:
            what = (
                f"differs from {plain(members[0].label)} by {distance:.0%} of its norm (over a sample): do they come "
                "from one pre-trained model? The average of unrelated models is not a model"
            )
            findings.append(Finding(member.label, what))
    if findings or len(members) < 3:
        return findings
    total = stack.sum(0)
    far = [float((row - (total - row) / (len(stack) - 1)).norm()) for row in stack]
    usual = sorted(far)[(len(far) - 1) // 2]
    for member, distance in zip(members, far, strict=True):
        if usual > 0 and distance > OUTLIER_RATIO * usual:
            what = f"is {distance / usual:.1f} times as far from the mean of the others as is usual among them"
            findings.append(Finding(member.label, what))
    return findings
