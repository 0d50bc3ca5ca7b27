"""A stand-in for the compiler of device kernels, which ttnn's wheel lacks: mock devices run no kernel.

It "compiles" every kernel to a program that returns at once. It must never be used with real chips, and its output must
not stay in a cache that real runs use.
"""

import importlib.util
import struct
from pathlib import Path

TOOLS = ("g++", "gcc", "objcopy")

VERSION = """\
riscv-tt-elf-g++ (tenstorrent/sfpi:7.89.0[1050]) 15.1.0
Copyright (C) 2025 Free Software Foundation, Inc.
This is free software; see the source for copying conditions.  There is NO
warranty; not even for MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.

"""
"""The exact version text of the real compiler, by whose hash tt-metal finds the firmware in the wheel."""

TOOL = """\
#!/bin/sh
here=$(dirname "$0")
[ "$1" = --version ] && exec cat "$here/version.txt"
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && output=$2
  shift
done
case "$output" in
  "") ;;
  *.elf*) cp "$here/nothing.elf" "$output" ;;
  *.o*) : > "$output"; echo "$output:" > "${output%.o*}.d" ;;
  *) : > "$output" ;;
esac
"""

RETURN = struct.pack("<I", 0x00008067) * 4
"""The code of a kernel: RISC-V's `ret`, four times."""
LOADED_AT = 0x4000
HEADER, SEGMENT_HEADER, SECTION_HEADER, SYMBOL, RELOCATION = 52, 32, 40, 16, 12
"""The sizes of ELF32's structures in bytes."""
NAMES = b"\0.text\0.symtab\0.strtab\0.rela.text\0.shstrtab\0"
SECTIONS = 6


def make_runtime_root(root: Path) -> None:
    """Creates a TT_METAL_RUNTIME_ROOT in `root`, with links to the installed ttnn package and the stand-in.

    Raises RuntimeError if ttnn is not installed.
    """
    found = importlib.util.find_spec("ttnn")
    if found is None or found.origin is None:
        raise RuntimeError("ttnn is not installed")
    package = Path(found.origin).parent
    tools = root / "runtime" / "sfpi" / "compiler" / "bin"
    tools.mkdir(parents=True)
    for entry in [*package.iterdir(), package / "runtime" / "hw"]:
        if entry.name != "runtime":
            (root / entry.relative_to(package)).symlink_to(entry)
    (tools / "version.txt").write_text(VERSION, encoding="utf-8")
    (tools / "nothing.elf").write_bytes(program_that_returns())
    for name in TOOLS:
        tool = tools / f"riscv-tt-elf-{name}"
        tool.write_text(TOOL, encoding="utf-8")
        tool.chmod(0o755)


def program_that_returns() -> bytes:
    """An ELF32 executable for RISC-V with one loaded segment, its code, without symbols and relocations."""
    text_at = HEADER + SEGMENT_HEADER
    symbols_at = text_at + len(RETURN)
    strings_at = symbols_at + SYMBOL
    names_at = strings_at + 4
    sections_at = (names_at + len(NAMES) + 3) & ~3
    identity = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    header = identity + struct.pack(
        "<HHIIIIIHHHHHH", 2, 243, 1, LOADED_AT, HEADER, sections_at, 0, HEADER, SEGMENT_HEADER, 1, SECTION_HEADER,
        SECTIONS, SECTIONS - 1,
    )  # fmt: skip
    segment = struct.pack("<8I", 1, text_at, LOADED_AT, LOADED_AT, len(RETURN), len(RETURN), 5, 4)
    body = header + segment + RETURN + bytes(SYMBOL) + bytes(4) + NAMES
    sections = [
        bytes(SECTION_HEADER),
        _section(".text", kind=1, flags=6, address=LOADED_AT, at=text_at, size=len(RETURN), align=4),
        _section(".symtab", kind=2, at=symbols_at, size=SYMBOL, link=3, info=1, align=4, entry=SYMBOL),
        _section(".strtab", kind=3, at=strings_at, size=4),
        _section(".rela.text", kind=4, flags=0x40, at=symbols_at, size=0, link=2, info=1, align=4, entry=RELOCATION),
        _section(".shstrtab", kind=3, at=names_at, size=len(NAMES)),
    ]
    return body.ljust(sections_at, b"\0") + b"".join(sections)


def _section(
    name: str,
    *,
    kind: int,
    at: int,
    size: int,
    flags: int = 0,
    address: int = 0,
    link: int = 0,
    info: int = 0,
    align: int = 1,
    entry: int = 0,
) -> bytes:
    named = NAMES.index(name.encode() + b"\0")
    return struct.pack("<10I", named, kind, flags, address, at, size, link, info, align, entry)
