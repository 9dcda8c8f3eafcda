"""Checks that the native libraries in a wheel run on the platform that its tag promises.

    python -m tools.check_wheel dist/*.whl

hatch_build.py checks every wheel that it builds.
"""

import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Libraries that every system with this tag has.
LINUX_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0"}
LINUX_LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
MACOS_LIBRARIES = {"/usr/lib/libSystem.B.dylib"}
WINDOWS_LIBRARIES = re.compile(rb"kernel32\.dll|ntdll\.dll|api-ms-win-[\w-]+\.dll", re.IGNORECASE)

ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
MACHO_CPUS = {"x86_64": 0x01000007, "arm64": 0x0100000C}
PE_AMD64 = 0x8664
LC_LOAD_DYLIB, LC_BUILD_VERSION, LC_VERSION_MIN_MACOSX = 0xC, 0x32, 0x24


def problems(wheel: Path) -> list[str]:
    """Reasons why a wheel would not run where its tag says, each naming the library.

    Args:
        wheel: path of a .whl file.
    """
    tag = wheel.stem.split("-")[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith((".so", ".dylib", ".dll"))]
        found = [
            f"{name}: {problem}"
            for name in names
            for problem in library_problems(archive.read(name), tag)
        ]
    if not names and tag != "any":
        found.append(f"the tag is {tag}, but there are no native libraries")
    if names and tag == "any":
        found.append("the tag is any, but there are native libraries")
    return found


def library_problems(data: bytes, tag: str) -> Iterator[str]:
    """Reasons why a library does not match the platform tag of a wheel.

    Args:
        data: the library.
        tag: the platform tag, such as "manylinux_2_17_x86_64".
    """
    if data[:4] == b"\x7fELF" and "linux" in tag:
        yield from _elf_faults(data, tag)
    elif data[:4] == b"\xcf\xfa\xed\xfe" and tag.startswith("macosx"):
        yield from _macho_faults(data, tag)
    elif data[:2] == b"MZ" and tag.startswith("win"):
        yield from _pe_faults(data, tag)
    else:
        yield f"is not a library for {tag}"


def _elf_faults(data: bytes, tag: str) -> Iterator[str]:
    """The names of libraries and of symbol versions stand in the string table as they are."""
    machine = struct.unpack_from("<H", data, 18)[0]
    if not any(tag.endswith(name) and machine == code for name, code in ELF_MACHINES.items()):
        yield f"is for machine {machine}, not for {tag}"
    needed = {
        name.decode() for name in re.findall(rb"\0((?:lib|ld-)[\w+.-]+\.so[.\d]*)(?=\0)", data)
    }
    own = {name for name in needed if name.startswith("libsmol-")}
    for name in sorted(needed - own - LINUX_LIBRARIES - LINUX_LOADERS):
        yield f"needs {name}, which a system may lack"
    promised = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    versions = {
        (int(major), int(minor)) for major, minor in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", data)
    }
    newest = max(versions, default=(0, 0))
    if promised and newest > (int(promised[1]), int(promised[2])):
        yield f"needs glibc {newest[0]}.{newest[1]}, newer than {tag} promises"


def _macho_faults(data: bytes, tag: str) -> Iterator[str]:
    _, major, minor, machine = re.fullmatch(r"(macosx)_(\d+)_(\d+)_(\w+)", tag).groups()  # type: ignore[union-attr]
    cpu = struct.unpack_from("<I", data, 4)[0]
    if cpu != MACHO_CPUS.get(machine):
        yield f"is for CPU type {cpu:#x}, not for {tag}"
    for command, body in _load_commands(data):
        if command == LC_LOAD_DYLIB:
            offset = struct.unpack_from("<I", body, 8)[0]
            name = body[offset:].split(b"\0")[0].decode()
            if name not in MACOS_LIBRARIES:
                yield f"needs {name}, which a system may lack"
        elif command in (LC_BUILD_VERSION, LC_VERSION_MIN_MACOSX):
            packed = struct.unpack_from("<I", body, 12 if command == LC_BUILD_VERSION else 8)[0]
            needs = (packed >> 16, packed >> 8 & 0xFF)
            if needs > (int(major), int(minor)):
                yield f"needs macOS {needs[0]}.{needs[1]}, newer than {tag} promises"


def _load_commands(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The load commands of a 64-bit Mach-O file: number and bytes, header included."""
    count, offset = struct.unpack_from("<I", data, 16)[0], 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, offset)
        yield command & 0x7FFFFFFF, data[offset : offset + size]
        offset += size


def _pe_faults(data: bytes, tag: str) -> Iterator[str]:
    header = struct.unpack_from("<I", data, 0x3C)[0]
    machine = struct.unpack_from("<H", data, header + 4)[0]
    if tag != "win_amd64" or machine != PE_AMD64:
        yield f"is for machine {machine:#x}, not for {tag}"
    for name in sorted(set(re.findall(rb"[\w.-]+\.dll(?=\0)", data, re.IGNORECASE))):
        if not WINDOWS_LIBRARIES.fullmatch(name) and not name.startswith(b"libsmol-"):
            yield f"needs {name.decode()}, which a system may lack"


def main() -> None:
    wheels = [Path(name) for name in sys.argv[1:]]
    found = [f"{wheel}: {problem}" for wheel in wheels for problem in problems(wheel)]
    if found or not wheels:
        sys.exit("\n".join(found) or "usage: python -m tools.check_wheel WHEEL...")
    sys.stdout.write("".join(f"{wheel}: ok\n" for wheel in wheels))


if __name__ == "__main__":
    main()
