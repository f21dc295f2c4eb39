"""The model before compression, measured on folds of the train data: what candidates are compared with."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import count, evenly
from fleetpress.compression.confidence import sample_sums, value_of
from fleetpress.compression.cost import parameters, sample_macs
from fleetpress.compression.evaluation import Runner, all_outputs
from fleetpress.compression.metrics import METRICS, Sums, drop
from fleetpress.compression.outputs import meaning
from fleetpress.compression.program import tensors
from fleetpress.compression.sensitivity import divergence

from ..errors import ModelError
from ..handover import Payload
from ..planning.fleet import Fold
from ..programs.materials import arrays, first_arrays, remembered, trained_program
from ..programs.objective import is_fidelity, loss_name, measured, metric_name
from .choices import Searched
from .effort import Effort, effort

_MOST_SAMPLES = 6144  # of all folds together that a candidate is measured on
_DIVERGING = 256  # samples that tell how far outputs moved
_KEPT_BYTES = 1 << 26  # of the outputs of a fold
METHOD = "gptq"
_RATES = ((2_000_000, 2e-3), (10_000_000, 5e-4), (math.inf, 1e-4))  # learning rates up to so many parameters


def effort_of(payload: Payload, program: ExportedProgram) -> Effort:
    """How long a candidate of this search is fine-tuned, and on how many folds it is measured."""
    files, options = payload["data"]["train"], payload["options"]
    samples = first_arrays(files)
    return effort(
        count(samples) * len(files),
        sample_macs(program, samples),
        folds=options["folds"],
        epochs=options.get("epochs"),
    )


def _float_bits(program: ExportedProgram) -> float:
    """Bits of a parameter or buffer that holds floats, on average."""
    floats = [value for value in tensors(program).values() if value.is_floating_point()]
    entries = sum(value.numel() for value in floats)
    return 8 * sum(value.nbytes for value in floats) / entries if entries else 32.0


class Original:
    """The model before; what it gave is remembered in this process."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._folds: int = payload["options"]["folds"]
        self.program = trained_program(payload)
        self._runner = Runner(self.program)
        samples = first_arrays(payload["data"]["train"])
        self._loss = loss_name(payload["data"], samples)
        self.metric = metric_name(payload["data"], measured(payload["data"], samples), self.program)

    def searched(self) -> Searched:
        """What the recipes of the search are made of. Large nets are trained in small steps."""
        size, given = parameters(self.program), effort_of(self._payload, self.program)
        return Searched(
            epochs=given.epochs,
            batch_size=given.batch_size,
            folds=given.folds,
            method=METHOD,
            lr=next(lr for most, lr in _RATES if size <= most),
            is_labelled=self._loss != "distillation",
            grows=given.grows,
            float_bits=_float_bits(self.program),
        )

    def value(self) -> float:
        """The metric on all folds."""
        folds = (Fold(index=index, of=self._folds) for index in range(self._folds))
        return value_of(self.metric, [item for fold in folds for item in self.sums(fold, of=self._folds)])

    def memory(self) -> float | None:
        """By how much it is worse on eval data than on the folds; None where that cannot be told."""
        data = self._payload["data"]
        if not data["eval"] or METRICS[self.metric].needs != "targets":
            return None
        key = f"unseen-{self._key}-{[file['etag'] for file in data['eval']]}"
        unseen = remembered(
            key,
            lambda: sample_sums(
                self._runner, evenly(measured(data, arrays(data["eval"])), _MOST_SAMPLES), self.metric
            ),
        )
        return drop(self.metric, self.value(), value_of(self.metric, unseen))

    def divergence(self, program: ExportedProgram, fold: Fold) -> float:
        """How far another program's outputs are from its own on some of the fold's samples, in the unit of the expected
        increases.
        """
        samples = evenly(self._samples(fold, 1), _DIVERGING)
        before = remembered(f"diverging-{self._key_of(fold)}", lambda: all_outputs(self._runner, samples))
        return divergence(before, all_outputs(Runner(program), samples), meaning(self.program))

    def sums(self, fold: Fold, *, of: int) -> Sequence[Sums]:
        """The metric's sums of the fold's samples, which are one of so many parts of all that are looked at."""
        key = f"base-{self._key_of(fold)}-{of}"
        return remembered(
            key,
            lambda: sample_sums(self._runner, self._samples(fold, of), self.metric, reference=self._runner),
        )

    def sums_of(self, program: ExportedProgram, fold: Fold, *, of: int) -> list[Sums]:
        """The same of another program."""
        samples = self._samples(fold, of)
        reference = self._outputs(fold, of, samples) if is_fidelity(self.metric) else None
        return sample_sums(Runner(program), samples, self.metric, reference=reference)

    def _outputs(self, fold: Fold, of: int, samples: Mapping[str, Tensor]) -> Runner | Tensor:
        """What candidates are compared with: outputs that are kept, or the model where they are too many."""
        if count(samples) * self._output_bytes > _KEPT_BYTES:
            return self._runner
        key = f"outputs-{self._key_of(fold)}-{of}"
        return remembered(key, lambda: all_outputs(self._runner, samples))

    @cached_property
    def _output_bytes(self) -> int:
        """Of one sample."""
        samples = first_arrays(self._payload["data"]["train"])
        return all_outputs(self._runner, evenly(samples, 1)).nbytes

    def _samples(self, fold: Fold, of: int) -> Mapping[str, Tensor]:
        files = [
            {**file, "fold": dict(vars(fold.in_shard(number)))}
            for number, file in enumerate(self._payload["data"]["train"])
        ]
        samples = arrays(files)
        if not count(samples):
            raise ModelError(
                f"the train data are too few to be cut into auto's {fold.of} folds, "
                f"of which number {fold.index + 1} holds no sample; give some hundred samples at least"
            )
        return evenly(measured(self._payload["data"], samples), -(-_MOST_SAMPLES // of))

    @property
    def _key(self) -> str:
        stages, files = self._payload["stages"], self._payload["model"]["files"]
        return f"{stages.get('train') or files[0]['etag']}-{self.metric}"

    def _key_of(self, fold: Fold) -> str:
        return f"{self._key}-{fold}-{[file['etag'] for file in self._payload['data']['train']]}"
