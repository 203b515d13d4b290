"""The parts of a recipe: frozen data, each field one key of the YAML file.

They do not know how they are read, checked or obeyed. Invariant: plain values only; what a field means is said here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CorpusPart:
    """Which text: per mille of files held out (by digest) and the fraction of the possible chats that is used.

    `recall_documents` questions about facts far back are learned besides, each over `recall_fewest_lines` to `recall_lines` lines.
    Of those with many questions the share `recall_at_end` states its first fact in the first line and asks in the last tenth.
    `aligned`: a sequence begins with a document where one begins in what it would be.
    """

    held_out_permille: int
    chat_share: float
    recall_documents: int = 0
    recall_lines: int = 100
    recall_fewest_lines: int = 4
    recall_at_end: float = 0.0
    aligned: bool = False


@dataclass(frozen=True, slots=True)
class LengthPhase:
    """Train on sequences of `tokens` until this fraction of the budget is spent.

    `pictures` is the share of sequences that ask about pictures in this phase, where it is not that of the recipe.
    """

    until: float
    tokens: int
    pictures: float | None = None


@dataclass(frozen=True, slots=True)
class SegmentPart:
    """Segment-recurrent training: sequences are read in segments of `tokens`, over the detached keys and values of earlier segments.

    `memory_tokens` bounds what is kept of them; 0 keeps the whole sequence.
    """

    tokens: int
    memory_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DistilPart:
    """Learning from a teacher: the shares of the loss that are KL divergence at `temperature` and squared error of the logits."""

    kl: float
    mse: float
    temperature: float


@dataclass(frozen=True, slots=True)
class QuantisePart:
    """Quantisation-aware training: from `start` of the budget on, matrix products compute as int8 would."""

    start: float


@dataclass(frozen=True, slots=True)
class SchedulePart:
    """Budget and rates over time. Fractions are of the budget (steps if `steps` > 0, else wall-clock `minutes`).

    The rate rises linearly over `warmup_steps`, stays, and falls linearly from `decay_from` to `floor` of itself at the end. A step takes
    `batch_tokens`, in passes of `micro_tokens`, or of one sequence where that is longer.
    """

    steps: int
    minutes: float
    batch_tokens: int
    micro_tokens: int
    warmup_steps: int
    decay_from: float
    floor: float
    lengths: tuple[LengthPhase, ...]

    def rate(self, progress: float, step: int) -> float:
        """The factor on every learning rate at `progress` (0 … 1) in step number `step` (from 1 on)."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if progress < self.decay_from:
            return 1.0
        left = (1.0 - min(progress, 1.0)) / (1.0 - self.decay_from)
        return self.floor + (1.0 - self.floor) * left

    def pass_tokens(self, length: int) -> int:
        """Tokens of one pass when sequences have `length` tokens."""
        return max(self.micro_tokens, length)

    def length(self, progress: float) -> int:
        """The sequence length in tokens at `progress`."""
        for phase in self.lengths:
            if progress < phase.until:
                return phase.tokens
        return self.lengths[-1].tokens


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """`kind` muon: Muon on the matrices of the layers and AdamW on the rest; adamw: AdamW on everything."""

    kind: str
    matrix_rate: float
    rest_rate: float
    momentum: float
    weight_decay: float
    beta1: float
    beta2: float
    clip: float


@dataclass(frozen=True, slots=True)
class AveragePart:
    """An exponential average of the weights with this `decay` a step, begun when `start` of the budget is spent. decay 0 is off.

    What is published lies `init` of the way back to the weights that the run began with (--init), in the manner of WiSE-FT (Wortsman et
    al. 2022): what was learned before and what was learned now.
    """

    start: float
    decay: float
    init: float = 0.0


@dataclass(frozen=True, slots=True)
class EvaluatePart:
    """Held-out loss `times` during the run on the first `tokens` held-out tokens, at the end on the first `final_tokens` (0: all)."""

    times: int
    tokens: int
    final_tokens: int


@dataclass(frozen=True, slots=True)
class SamplePart:
    """What the card shows: continuations of `prompts` with at most `tokens` tokens at these temperatures, and chats."""

    prompts: tuple[str, ...]
    chats: tuple[str, ...]
    temperatures: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class PicturesPart:
    """Questions about pictures among the text, for lines that read images.

    `source` is digits or the path of a MedMNIST .npz, which brings its own split; else `held_out_permille` of the pictures are held out.
    `share` of the sequences are questions, the loss of whose answers counts `weight` times. With `tokens` it is the share of the passes,
    which then hold nothing but questions in sequences of that many tokens: long phases need not be filled up with padding. Every picture
    to learn from comes `variants` times more, moved, turned and scaled a little.
    """

    source: str
    held_out_permille: int
    share: float
    weight: float
    variants: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class PublishPart:
    """How the result is stored: weight type on disk, and the sampling defaults that a server takes from it."""

    dtype: str
    temperature: float
    top_p: float
