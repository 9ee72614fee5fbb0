"""A callback that measures the memory of training by PyTorch's profiler, allocation by allocation."""

import gc
import json
from pathlib import Path

import lightning as L
from torch.profiler import ProfilerActivity, profile


class PeakOfFit(L.Callback):
    """Writes what the model holds before a fit, and the most that was allocated on top of it, as JSON.

    The profiler must see a tensor made to see it freed, hence the whole fit; and it sees those of an earlier fit of
    this process freed, hence the collection before.

    Args:
        path: Where to.
    """

    def __init__(self, path: str) -> None:
        self.path, self.found = Path(path), {}

    def on_fit_start(self, trainer, module) -> None:
        tensors = (*module.core_seg.parameters(), *module.core_seg.buffers())
        self.found["weights"] = sum(tensor.nbytes for tensor in tensors)
        self.found["parameters"] = sum(p.numel() for p in module.parameters())
        self.found["trained"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.found["answers"], self.found["prompts"] = [], []
        gc.collect()
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        reasoner = module.core_seg.reasoner
        self.found["records"] = len(batch["query"])
        self.found["images"] = len({pixels.numpy().tobytes() for pixels in batch["pixels"]})
        self.found["prompts"] += [len(reasoner.prompt_ids(query)) for query in batch["query"]]
        if module.stage == "grpo":
            self.found["answers"] += [len(completion) for group in module.groups for completion in group.completions]
        else:
            self.found["answers"] += [len(reasoner.completion_ids(answer)) for answer in batch["answer"]]

    def on_train_end(self, trainer, module) -> None:
        self.profiler.__exit__(None, None, None)
        states = [t for values in trainer.optimizers[0].state.values() for t in values.values()]
        self.found["optimiser"] = sum(tensor.nbytes for tensor in states)
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        self.path.write_text(json.dumps(self.found | {"peak": peak}))
