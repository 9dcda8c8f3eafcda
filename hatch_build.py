"""Build hook: compiles the kernels into wheels, which it checks, and for editable installs."""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs tools/build_kernels.py.

    SMOL_WHEEL_TARGET selects another platform (cross-compiled with ziglang), see `make wheels`.
    SMOL_WHEEL_FOR_THIS_CPU leaves out the kernels that this CPU cannot run, to save time.
    """

    def dependencies(self) -> list[str]:
        """The `ziglang` package, if it is needed as the compiler."""
        add_to_path(self.root)
        from tools.build_kernels import system_compiler

        needs_zig = "SMOL_WHEEL_TARGET" in os.environ or system_compiler() is None
        return ["ziglang>=0.13"] if needs_zig else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels, and tag the wheel with its platform."""
        if self.target_name != "wheel":
            return
        add_to_path(self.root)
        from tools.build_kernels import WHEEL_TARGETS, build, host

        name = os.environ.get("SMOL_WHEEL_TARGET")
        target = WHEEL_TARGETS[name] if name else host()
        if version == "editable":
            build(target, runnable_only=True)
            return
        folder = Path(self.root) / "build" / "kernels" / (name or "host")
        libraries = build(target, folder, runnable_only="SMOL_WHEEL_FOR_THIS_CPU" in os.environ)
        if not libraries:
            self.app.display_warning(f"no native kernels for {target.machine}: smol will use torch")
            return
        tag = target.tag or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
        for path in libraries:
            build_data["force_include"][str(path)] = f"smolcli/engine/native/{path.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Check that the kernels run on the platform that the wheel is tagged with."""
        if self.target_name != "wheel" or version == "editable":
            return
        add_to_path(self.root)
        from tools.check_wheel import problems

        if found := problems(Path(artifact_path)):
            self.app.abort("\n".join([f"{artifact_path} is tagged wrongly:", *found]))


def add_to_path(root: str) -> None:
    """Make `tools` and `smolcli` importable from the source tree."""
    if root not in sys.path:
        sys.path.insert(0, root)
