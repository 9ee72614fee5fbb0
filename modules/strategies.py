"""What `--trainer.strategy` may be on several processes: `ddp` or `fsdp2`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lab.errors import LabError

NAMES = ("auto", "ddp", "fsdp2")


class Replicated(DDPStrategy):
    """`ddp`: every process holds the whole model and trains on its share of each batch.

    Lightning's own, but the gradients are summed by `modules.parallel.sum_gradients` once before each optimiser step,
    not by torch's wrapper in each backward pass: GRPO has a backward pass for each group, and which parameters are used
    differs from step to step and process to process.
    """

    def configure_ddp(self) -> None:
        """Leave the model unwrapped."""


class Sharded(ModelParallelStrategy):
    """`fsdp2`: the language model's layers are spread over all processes.

    Lightning's own, but a checkpoint is that of one process to the letter, one file of whole tensors, so that a run may
    go on with another strategy or number of processes; and a parameter that has had no gradient yet is no error.
    """

    lightning_restore_optimizer = True

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Its state with whole tensors; all processes must call."""
        state = optimizer.state_dict()
        whole = lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value  # noqa: E731
        values = {place: {n: whole(v) for n, v in of.items()} for place, of in state["state"].items()}
        return state | {"state": values}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            values = {
                place: {name: as_sharded(value, parameters[place]) for name, value in of.items()}
                for place, of in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": values})


def as_sharded(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """What an optimiser keeps of a parameter, spread as the parameter is; its count of steps stays as it is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def register() -> None:
    """Give the two their names on the command line."""
    StrategyRegistry.register("ddp", Replicated, "the whole model on every process", override=True)
    StrategyRegistry.register("fsdp2", Sharded, "the language model's layers spread over all processes", override=True)


def check_strategy(name: object) -> None:
    """Refuse strategies that would sum gradients otherwise than the modules expect.

    Args:
        name: What was given as `--trainer.strategy`.

    Raises:
        LabError: Naming those that there are.
    """
    if name not in NAMES:
        raise LabError(f"--trainer.strategy {name} is not supported; take one of {', '.join(NAMES)}")
