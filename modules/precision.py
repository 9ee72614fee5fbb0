"""Training passes in bfloat16, on hardware that has it."""

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether its arithmetic is in the hardware: elsewhere it is emulated, on a CPU with AVX2 alone about 15
    times as slow as float32 (`tiny`'s image encoder, forward and backward)."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def bfloat16(device: torch.device, wanted: bool) -> torch.autocast:
    """bfloat16 autocast; nothing where it is not wanted, or where the hardware does not have it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))
