"""The record of one run, as it is stored in `results/runs/`: the one definition that writer and readers share."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from lra.errors import brief
from lra.results.validation import Part, convert

SCHEMA = 1
AT_CHANCE = "at chance (not significantly above the majority class)"
"""The value of `RunRecord.collapsed` for a run at chance."""

Share = Annotated[float, Meta(ge=0, le=1)]
Number = int | float


class Measured(Part, frozen=True, kw_only=True):
    """The scores of a target beside the accuracy (`lra.target`). seconds: of scoring.

    positions, last: of a target at each position, the share of right scored positions, and of examples whose last
    scored position is right; accuracy is then that of whole sequences. error: mean squared error of a real value;
    accuracy is then the share of errors up to `tolerance`.

    bits: per token, where the target is the next token and n the number of tokens; bits_low, bits_high: its 95 %
    interval over examples; bits_at: by the number of tokens before, "16-63".
    """

    correct: int | None = None
    seconds: Number | None = None
    positions: Share | None = None
    last: Share | None = None
    error: Number | None = None
    tolerance: Number | None = None
    bits: Number | None = None
    bits_low: Number | None = None
    bits_high: Number | None = None
    bits_at: dict[str, Number] = field(default_factory=dict)


class Score(Measured, frozen=True, kw_only=True):
    """Accuracy on a split: the share of its n examples that are right. length: longest sequence of the split, in
    tokens, of a generated task, and of a split with longer sequences than those of training."""

    accuracy: Share
    n: Annotated[int, Meta(ge=1, lt=2**31)]
    length: int | None = None

    @property
    def share(self) -> float:
        """Share of right answers, which floors and chance compare with: of positions where positions are scored."""
        return self.accuracy if self.positions is None else self.positions

    @property
    def perplexity(self) -> float | None:
        """Per token; None where the target is not the next token."""
        return None if self.bits is None else 2.0**self.bits


class Selection(Measured, frozen=True, kw_only=True):
    """Accuracy on the split that chose the checkpoint, and the step of that checkpoint."""

    accuracy: Share | None = None
    n: int | None = None
    split: str = ""
    best_step: int | None = None


class ProtocolName(Part, frozen=True, kw_only=True):
    """The protocol of a task. length: longest sequence in tokens."""

    name: str
    length: Annotated[int, Meta(ge=1)] | None = None
    encoding: str = ""


class ResolvedRecipe(Part, frozen=True, kw_only=True, omit_defaults=False):
    """The recipe of a run with every setting resolved, as `lra.config.recipe.Recipe.as_dict` gives it."""

    name: str
    task: str = ""
    architecture: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    width: int = 0
    depth: int = 0
    regime: str = ""
    note: str = ""
    smoke: bool = False
    expected: dict[str, Any] = field(default_factory=dict)


class ModelWork(Part, frozen=True, kw_only=True):
    """Floating-point operations for one example of `length` tokens. matmul: of matrix products, counted, and by the
    architecture's formula; uncounted: operators that the counter does not know."""

    forward: Number | None = None
    forward_backward: Number | None = None
    matmul: Number | None = None
    matmul_by_formula: Number | None = None
    length: int | None = None
    uncounted: tuple[str, ...] = ()
    convention: str = ""


class Speed(Part, frozen=True, kw_only=True):
    """Throughput of training; tokens include padding. examples: seen in training, repeats counted."""

    examples: int
    examples_per_second: Number
    tokens_per_second: Number | None = None
    training_seconds: Number | None = None
    steps: int | None = None


class PretrainingSpeed(Speed, frozen=True, kw_only=True):
    """Throughput of the self-pretraining stage."""

    objective: str


class Memory(Part, frozen=True, kw_only=True):
    """Peak memory of training in bytes. method: how it was measured; reserved_bytes: by CUDA's allocator."""

    peak_bytes: Number
    reserved_bytes: int | None = None
    method: str = ""


class StageCompute(Part, frozen=True, kw_only=True):
    """Cost of one stage of a self-pretrained run. flops: forward and backward at the protocol's full length."""

    seconds: Number
    examples: int
    flops: Number


class Data(Part, frozen=True, kw_only=True):
    """The prepared data: its SHA-256 and the number of examples of each split."""

    checksum: str = ""
    counts: dict[str, int] = field(default_factory=dict)


class Commit(Part, frozen=True, kw_only=True, omit_defaults=False):
    """The git commit of the code, and whether the working tree differed from it."""

    hash: str = ""
    dirty: bool = False


class Environment(Part, frozen=True, kw_only=True):
    """Hardware and software of a run or a profile. device: "cpu" or "cuda"; devices: number of them, where several."""

    cpu: str
    gpu: str | None = None
    device: str | None = None
    devices: int | None = None
    strategy: str | None = None
    precision: str | int | None = None
    threads: int | None = None
    python: str = ""
    system: str = ""
    cuda: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: Commit = Commit()

    @property
    def dtype(self) -> str:
        """Type of the arithmetic, as `lra.results.profile.Cell.dtype` names it; empty where it was not recorded."""
        return {"32": "float32", "bf16": "bfloat16", "16": "float16"}.get(str(self.precision).partition("-")[0], "")

    @property
    def hardware(self) -> str:
        """The processor that did the work: the GPU's name, or the CPU's with its number of processors."""
        on_gpu = self.gpu is not None and self.device in (None, "cuda")
        return self.gpu if on_gpu and self.gpu else self.cpu


class CurvePoint(Part, frozen=True, kw_only=True):
    """One validation during training. loss: of training, since the validation before."""

    step: int
    validation_accuracy: Number | None = None
    validation_loss: Number | None = None
    loss: Number | None = None


class Trial(Part, frozen=True, kw_only=True):
    """One short run of the search for a learning rate: its rate and steps, validation accuracy and loss, training
    examples, and wall seconds."""

    lr: Number
    steps: int
    accuracy: Number
    loss: Number
    examples: int
    seconds: Number


class RateSearch(Part, frozen=True, kw_only=True):
    """The search for a learning rate: the chosen rate, and what all trials together cost."""

    lr: Number
    trials: tuple[Trial, ...]
    examples: int
    seconds: Number


class Compilation(Part, frozen=True, kw_only=True):
    """The outcome of `torch.compile`."""

    status: str
    graph_breaks: int = 0
    reason: str = ""


class Source(Part, frozen=True, kw_only=True):
    """The source of a user's class: SHA-256 of each file (`lra.source`), and one of all. Empty where it is unknown."""

    sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)


class PredictionsFile(Part, frozen=True, kw_only=True):
    """The .npz file beside the record: its name and SHA-256."""

    file: str
    sha256: str


class RunRecord(Part, frozen=True, kw_only=True):
    """One run: what was trained, on what, with which settings, and what came out.

    collapsed: why the run counts as at chance, empty if it does not. floors: share of right answers of rules without a
    sequence model on the same test set. changed: settings in which the run departs from the shipped recipe of that
    name, with the shipped values; None where that was not recorded. receptive_field: tokens that an output depends on,
    where they are fewer than the sequence holds. source: of an architecture that is not of this project; runs of
    different sources are different rows. init_from: the weights of another run that this one started with, and what
    of them did not fit. distillation: the run that this one imitated, with its accuracy and size, and how. compression:
    what was done to the model of a finished run, and accuracy, size and speed of both models; speed, memory, curve and
    wall_seconds are then those of the original's training. refused_implementations: kernels that failed their parity
    check. seal: SHA-256 of all other fields.

    curriculum: of examples by their difficulty, the run that scored them, the bins with their numbers of examples and
    mean difficulties, and the share of hard examples from each step on where it follows the accuracy.

    Of a generated task: tests, the scores on the further test splits of the protocol, by name; chance and plateaus,
    shares of right answers of a guess and of what is learnt first, by what that is.

    floor_bits: bits per token of rules without a sequence model, where the target is the next token.

    longer: of test splits with longer sequences than those of training, how each was read, or why that was not
    possible, by name.
    """

    schema: int
    id: str
    task: str
    architecture: str
    protocol: ProtocolName
    recipe: ResolvedRecipe
    recipe_hash: str
    seed: int
    regime: str
    direction: str
    test: Score
    validation: Selection
    floors: dict[str, Share]
    parameters: int
    flops: ModelWork
    speed: Speed
    memory: Memory
    implementations: dict[str, list[str]]
    data: Data
    environment: Environment
    command: str
    started: str
    wall_seconds: Number
    predictions: PredictionsFile
    seal: str = ""
    collapsed: str = ""
    changed: dict[str, Any] | None = None
    curve: tuple[CurvePoint, ...] = ()
    receptive_field: int | None = None
    search: dict[str, Any] | None = None
    source: Source | None = None
    rate_search: RateSearch | None = None
    pretraining: PretrainingSpeed | None = None
    compute: dict[str, StageCompute] | None = None
    compile: Compilation | None = None
    diagnostics: dict[str, Number] = field(default_factory=dict)
    off_course: str = ""
    refused_implementations: tuple[str, ...] = ()
    resumed: bool = False
    init_from: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    curriculum: dict[str, Any] | None = None
    compression: dict[str, Any] | None = None
    tests: dict[str, Score] = field(default_factory=dict)
    chance: Share | None = None
    plateaus: dict[str, Share] = field(default_factory=dict)
    floor_bits: dict[str, Number] = field(default_factory=dict)
    longer: dict[str, str] = field(default_factory=dict)

    @property
    def at_chance(self) -> bool:
        return bool(self.collapsed)

    @property
    def hardware(self) -> str:
        return self.environment.hardware

    @property
    def source_key(self) -> str:
        """The key that distinguishes sources of one name: empty for an architecture of this project. An unknown source
        is that of no other run."""
        return "" if self.source is None else self.source.sha256 or self.id


def from_json(content: Any) -> RunRecord:
    """A record from JSON content. Raises ValueError with one line on what is wrong."""
    if isinstance(content, dict) and content.get("schema") != SCHEMA:
        raise ValueError(f"schema is {brief(content.get('schema'))}; this version reads {SCHEMA}")
    return convert(content, RunRecord)


def to_json(record: RunRecord) -> dict[str, Any]:
    """JSON content of a record. Raises ValueError where it could not be read back."""
    content: dict[str, Any] = msgspec.to_builtins(record)
    from_json(content)
    return content
