"""What `--trainer.strategy` may be on several processes: `ddp`, `fsdp2` or `deepspeed`."""

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

from lab.errors import LabError


class Replicated(DDPStrategy):
    """`ddp`: every process holds the whole model and trains on its share of each batch.

    Lightning's own, but the gradients are summed by `modules.parallel.sum_gradients` once before each optimiser step,
    not by torch's wrapper in each backward pass: GRPO has a backward pass for each group, and which parameters are used
    differs from step to step and process to process.
    """

    def configure_ddp(self) -> None:
        """Leave the model unwrapped."""


class Sharded(ModelParallelStrategy):
    """`fsdp2`: the language model's layers are spread over all processes; a checkpoint is one file of whole tensors."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def register() -> None:
    """Give the two their names on the command line."""
    StrategyRegistry.register("ddp", Replicated, "the whole model on every process", override=True)
    StrategyRegistry.register("fsdp2", Sharded, "the language model's layers spread over all processes", override=True)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that would sum gradients otherwise than the modules expect.

    Raises:
        LabError: Naming those that there are.
    """
    if not isinstance(strategy, SingleDeviceStrategy | Replicated | Sharded | DeepSpeedStrategy):
        raise LabError(f"--trainer.strategy {type(strategy).__name__} is not supported; take ddp, fsdp2 or deepspeed")
