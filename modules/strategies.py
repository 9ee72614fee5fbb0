"""What `--trainer.strategy` may be on several processes: `ddp`, `fsdp2` or `deepspeed`."""

import itertools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lab.errors import LabError

NAMES = ("auto", "ddp", "fsdp2", "deepspeed")
DEEPSPEED = "deepspeed==0.19.8"
"""What it was tested with; requirements.txt leaves it out."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


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


class ZeroOptimizer(Replicated):
    """`deepspeed`: as `ddp`, but each process keeps its part of AdamW's state, and updates that part of the weights, by
    DeepSpeed's ZeRO stage 1.

    Lightning's own works on CUDA alone, averages gradients in each backward pass and writes a folder a checkpoint; here
    gradients are summed as under `ddp`, and a checkpoint is that of one process to the letter. One thing is otherwise:
    a parameter without a gradient, in a group of the optimiser where others have one, counts as one whose gradient is
    zero, which weight decay and momentum still move.
    """

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        if not self.optimizers:
            return
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # DeepSpeed asks for it, and srun does not set it
        (optimizer,) = self.optimizers
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        # it sees what is trained alone: frozen weights may be of another type
        trained = nn.ParameterList(parameter for group in self.groups for parameter in group)
        for parameter in trained:
            parameter.data = parameter.data.contiguous()  # as it is sent; convolutions have their channels last
        zero = {"stage": 1, "contiguous_gradients": False, "overlap_comm": False}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        self.engine = deepspeed.initialize(
            args=Namespace(device_rank=self.root_device.index or 0),
            model=trained,
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )[0]
        self.zero = self.engine.optimizer
        for (
            flat
        ) in optimizer.param_groups:  # before the first step, after which DeepSpeed looks for it in one group alone
            part = flat["params"][0]
            optimizer.state[part] = {name: torch.zeros_like(part) for name in MOMENTS} | {"step": torch.zeros(())}
        self.zero._lazy_init_hp_params_optimizer_state()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Gradients as under `ddp`, of which each process takes its part.

        Raises:
            LabError: For gradients that are not finite, by which DeepSpeed would not step, and would not say so.
        """
        result = self.precision_plugin._wrap_closure(model or self.lightning_module, optimizer, closure)
        learns = [any(parameter.grad is not None for parameter in group) for group in self.groups]
        if not any(learns):
            return result
        self.zero.reduce_gradients()  # the mean of what is the same on all
        step = type(self.zero)._optimizer_step
        self.zero._optimizer_step = lambda place: step(self.zero, place) if learns[place] else None
        self.zero.step()
        if self.zero.overflow:
            raise LabError("gradients are not finite; go on from an earlier checkpoint with a lower learning rate")
        for parameter in itertools.chain(*self.groups):
            parameter.grad = None
        return result

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """That of AdamW on one process; all processes must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Any] = {"state": {}, "param_groups": []}
        for group, flat in zip(self.groups, optimizer.param_groups):
            places = list(range(len(state["state"]), len(state["state"]) + len(group)))
            state["param_groups"].append(flat | {"params": places})
            step = optimizer.state[flat["params"][0]]["step"]
            for place, parameter in zip(places, group):
                moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
                state["state"][place] = {"step": step.clone().cpu(), **moments}
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        for group, flat, saved in zip(self.groups, optimizer.param_groups, state["param_groups"]):
            flat |= {name: value for name, value in saved.items() if name != "params"}
            kept = [(state["state"][place], p) for place, p in zip(saved["params"], group) if place in state["state"]]
            for values, parameter in kept:
                for name in MOMENTS:
                    safe_set_full_optimizer_state(parameter, values[name].to(parameter.device), name)
            if kept:  # one count for all of a group; a parameter without a gradient has a lower one in one process
                optimizer.state[flat["params"][0]]["step"] = max(values["step"] for values, _ in kept).clone()


def as_sharded(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """What an optimiser keeps of a parameter, spread as the parameter is; its count of steps stays as it is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def register() -> None:
    """Give them their names on the command line."""
    StrategyRegistry.register("ddp", Replicated, "the whole model on every process", override=True)
    StrategyRegistry.register("fsdp2", Sharded, "the language model's layers spread over all processes", override=True)
    StrategyRegistry.register("deepspeed", ZeroOptimizer, "AdamW's state spread over all processes", override=True)


def check_strategy(name: object) -> None:
    """Refuse strategies that would sum gradients otherwise than the modules expect.

    Args:
        name: What was given as `--trainer.strategy`.

    Raises:
        LabError: Naming those that there are, or what is to be installed.
    """
    if name not in NAMES:
        raise LabError(f"--trainer.strategy {name} is not supported; take one of {', '.join(NAMES)}")
    if name == "deepspeed" and not find_spec("deepspeed"):
        raise LabError(
            f"--trainer.strategy deepspeed needs DeepSpeed; pip install --no-build-isolation {DEEPSPEED}, or take fsdp2"
        )
