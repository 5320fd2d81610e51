"""What compiled code depends on beside the graph: versions, our sources, configuration, global flags, the machine."""

from __future__ import annotations

import operator
import platform
import sys
from pathlib import Path

import torch
from torch._inductor import config, cpp_builder
from torch._inductor.codecache import CacheBase, torch_key
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autodeploy import options
from autodeploy.inductor.fingerprint import Fingerprint, sources_hash


def machine_key(device: torch.device) -> str:
    """Hash of what tracing, passes and Inductor on `device` read of this process and machine. Raises NotHashable."""
    import transformers

    fingerprint = Fingerprint()
    fingerprint.add((torch.__version__, torch_key(), transformers.__version__, sys.version, sys.platform))
    fingerprint.add((sources_hash("autodeploy"), sources_hash("passes"), options.from_environment().library_settings))
    fingerprint.add(_inductor_config())
    fingerprint.add(_flags())
    fingerprint.add((_get_current_function_mode_stack(), _get_current_dispatch_mode_stack()))
    fingerprint.add((str(device), _gpu(device) if device.type == "cuda" else _cpu()))
    return fingerprint.hexdigest()


def _cpu() -> tuple[object, ...]:
    """What decides which instructions Inductor's C++ kernels use; trying them out takes it 1.6 s in each process."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    used = torch.backends.cpu.get_cpu_capability()
    return platform.machine(), platform.processor(), sorted(capabilities.items()), _cpu_flags(), used, _compiler()


def _cpu_flags() -> str:
    """Kernels are compiled for the very CPU (`-march=native`); empty where this is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compiler() -> tuple[str, str]:
    """The C++ compiler and its version, empty where there is none."""
    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception:  # of several types, all of which say that there is none
        return "", ""
    return compiler, cpp_builder.get_compiler_version_info(compiler)


def _gpu(device: torch.device) -> tuple[object, ...]:
    system = CacheBase.get_system()  # with the sources of Triton
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), repr(system)


def _inductor_config() -> list[object]:
    """Inductor's own key leaves out what cannot be pickled: passes given to it. Here these are hashed by their code."""
    common = sys.modules.get("torch._inductor.codegen.common")
    passes = {name: step for name, step in getattr(common, "custom_backend_passes", {}).items() if step is not None}
    return [
        config.save_config_portable(ignore_private_configs=False, readonly_values=True),
        [operator.attrgetter(name)(config) for name in config._save_config_ignore],
        torch._functorch.config.save_config_portable(ignore_private_configs=False),  # type: ignore[attr-defined]
        passes,
    ]


def _flags() -> list[object]:
    """Settings of torch that change what code means, or which kernels it becomes."""
    backends = torch.backends
    return [
        torch.get_num_threads(),
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.fp32_precision,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled(),
        backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ),
        (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
    ]
