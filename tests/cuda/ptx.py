"""PTX, as a compiler wrote it, turned into C++ for the emulator: one statement an instruction, registers as locals."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

#: C++ types of registers. It is the instruction that says what the bits mean.
REGISTERS = {
    "pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t", "b8": "uint8_t",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "usb" for bits in (16, 32, 64)},
}  # fmt: skip
TYPES = {
    "pred": "bool", "f16": "__half", "bf16": "__nv_bfloat16", "f32": "float", "f64": "double",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
}  # fmt: skip
#: What one instruction says of caches, ordering and the like: nothing that changes a result here.
IGNORED = {"volatile", "relaxed", "weak", "gpu", "cta", "sys", "nc", "uni", "aligned", "approx", "full", "L1", "L2",
           "evict_first", "evict_last", "evict_normal", "no_allocate", "cache_hint", "128B", "256B", "cg", "ca", "cs",
           "wt", "lu", "cv", "sync"}  # fmt: skip
#: Modifiers that do change it, of which each instruction that has one says what it means.
CHANGING = {"rz", "rm", "rp", "sat", "relu"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
               "hs": ">="}  # fmt: skip
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])$|%laneid$")


class Entry(NamedTuple):
    """A kernel's :func:`kernel_key`, and ``extern "C" void PREFIX<key>(const void* const* params)``, which does it."""

    key: str
    source: str


#: Before a kernel's key in the name of its translation.
PREFIX = "translated_"


#: What instructions are counted as, and the first words of each. Moves between registers, and loads of parameters, are
#: of PTX alone: the machine's instructions have them as operands.
KINDS = {
    "multiply-add": ("fma", "mad"),
    "float": ("copysign", "ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh"),
    "convert": ("cvt",),
    "compare, select": ("setp", "selp"),
    "integer": ("shl", "shr", "and", "or", "xor", "not", "popc", "rem", "bfe", "prmt", "shf"),
    "global": (),
    "shared": ("ldmatrix", "stmatrix", "cp"),
    "tensor core": ("mma",),
    "branch": ("bra", "ret"),
    "warp, block": ("shfl", "bar", "redux", "vote"),
    "none": ("mov", "cvta"),
}


def kind_of(words: list[str], operands: list[str]) -> str:
    op = words[0]
    if op in ("ld", "st"):
        return next((space for space in ("global", "shared") if space in words), "none")
    if op == "wgmma":
        return "tensor core" if "mma_async" in words else "none"
    if op == "mov" and "{" in "".join(operands):
        return "convert"
    if op in ("add", "sub", "mul", "min", "max", "mad", "neg", "abs", "div"):
        return ("multiply-add" if op == "mad" else "float") if words[-1][0] == "f" else "integer"
    return next((kind for kind, ops in KINDS.items() if op in ops), "none")


def machine_instructions(words: list[str]) -> int:
    """How many of the machine's an instruction is: a GPU divides no integers, and ptxas puts so many in its place."""
    if words[0] in ("div", "rem") and words[-1][0] in "us":
        return 100 if words[-1].endswith("64") else 20
    return 1


def entries(ptx: str, counted: bool = False) -> Iterator[Entry]:
    """Each ``.entry`` of a module; counted: every instruction adds to ``emulate_counts`` at its kind's place."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    shared = re.findall(r"\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+(\w+)\[", ptx)
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", ptx):
        body, depth, end = ptx[found.end() :], 1, 0
        while depth:
            brace = re.compile(r"[{}]").search(body, end)
            assert brace is not None, "a kernel without an end"
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
        parameters = re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", found[2].strip())
        key = kernel_key(found[1])
        yield Entry(key, Translator(shared, parameters, counted).function(PREFIX + key, body[: end - 1]))


def split(operands: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for c in operands:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


class Translator:
    """One kernel's body; ``shared`` and ``parameters`` are the names that stand for addresses."""

    def __init__(self, shared: list[str], parameters: list[str], counted: bool) -> None:
        self.shared, self.parameters, self.counted = shared, parameters, counted
        self.widths: dict[str, str] = {}
        #: Whether the instruction takes float32 numbers below the smallest normal one for 0, and yields 0 for them.
        self.flushes = False

    def function(self, name: str, body: str) -> str:
        lines = [f'extern "C" void {name}(const void* const* params) {{', "using namespace machine;", "(void)params;"]
        lines += self.declarations(body)
        for depot in re.finditer(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", body):
            lines.append(f"alignas({depot[1]}) unsigned char {depot[2]}[{depot[3]}];")
        body = re.sub(r"\.(local|loc|file|pragma|branchtargets)\s[^;\n]*[;\n]", "", body)
        lines += self.statements(body)
        return "\n".join([*lines, "}"])

    def declarations(self, body: str) -> Iterator[str]:
        """Registers of the whole kernel: a jump may not pass over where a variable begins."""
        for kind, prefix, count in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;", body):
            self.widths[prefix] = REGISTERS[kind]
            names = [f"{prefix[1:]}_{i} = poison<{REGISTERS[kind]}>()" for i in range(int(count))]
            yield f"{REGISTERS[kind]} {', '.join(names)};"

    def statements(self, body: str) -> Iterator[str]:
        place = 0
        while True:
            found = re.compile(r"\s*(?:([\w$]+):|([{}])|([^;]*;))").match(body, place)
            if found is None:
                return
            place = found.end()
            if found[1]:
                yield f"{self.label(found[1])}:;"
            elif found[2]:
                yield found[2]
            elif found[3].strip(" \t\n;"):
                yield self.statement(" ".join(found[3].rstrip(";").split()))

    def statement(self, text: str) -> str:
        if text.startswith(".reg"):
            _, kind, names = text.split(maxsplit=2)
            if "<" in names:
                return ""
            for name in split(names):
                self.widths[name] = REGISTERS[kind[1:]]
            return f"{REGISTERS[kind[1:]]} {', '.join(self.local(name) for name in split(names))};"
        found = re.match(r"(?:@(!?)([%\w]+)\s+)?(\S+)\s*(.*)$", text)
        assert found is not None, text
        words = re.split(r"\.|::", found[3])
        try:
            code = self.instruction(words, split(found[4]))
            if self.counted:
                kind = list(KINDS).index(kind_of(words, split(found[4])))
                code = f"emulate_counts[{kind}] += {machine_instructions(words)}; {code}"
        except (KeyError, ValueError, AttributeError, IndexError) as error:
            raise NotImplementedError(f"PTX that the translator does not know: {text}") from error
        return f"if ({found[1]}{self.value(found[2], 'pred')}) {{ {code} }}" if found[2] else code

    @staticmethod
    def label(name: str) -> str:
        return "L_" + name.replace("$", "")

    @staticmethod
    def local(name: str) -> str:
        return name.lstrip("%").replace("$", "_") + "_local"

    def register(self, name: str) -> tuple[str, str]:
        """Its C++ name and type."""
        if name in self.widths:
            return self.local(name), self.widths[name]
        found = re.fullmatch(r"(%[a-z]+)(\d+)", name)
        if found is None:
            raise ValueError(name)
        return f"{found[1][1:]}_{found[2]}", self.widths[found[1]]

    def value(self, operand: str, kind: str) -> str:
        """The operand as ``kind``."""
        value = self.unflushed(operand, kind)
        return f"flushed({value})" if self.flushes and kind == "f32" else value

    def unflushed(self, operand: str, kind: str) -> str:
        cpp = TYPES[kind]
        if operand[:2] in ("0f", "0d"):
            single = operand[1] == "f"
            number = struct.unpack(">f" if single else ">d", bytes.fromhex(operand[2:]))[0]
            if kind == ("f32" if single else "f64") and math.isfinite(number):
                return f"{number.hex()}{'f' if single else ''}"
            return f"as<{cpp}>(uint{32 if single else 64}_t(0x{operand[2:]}ull))"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            return f"({cpp})({operand.rstrip('U')}ll)"
        if (special := SPECIAL.match(operand)) is not None:
            names = {"tid": "thread_index", "ntid": "block_size", "ctaid": "block_index", "nctaid": "grid_size"}
            call = f"emulator::{names[special[1]]}().{special[2]}" if special[1] else "emulator::lane()"
            return f"({cpp}){call}"
        if operand in self.parameters:
            return f"(uint64_t)params[{self.parameters.index(operand)}]"
        name, _, offset = operand.replace(" ", "").partition("+")
        if name in self.shared:
            return f"({cpp})(kShared + {offset or 0})"
        if re.fullmatch(r"__local_depot\d+", operand):
            return f"(uint64_t){operand}"
        name, own = self.register(operand)
        return name if own == cpp else f"({cpp}){name}" if (own, cpp) in CASTS else f"as<{cpp}>({name})"

    def put(self, target: str, kind: str, value: str) -> str:
        if self.flushes and kind == "f32":
            value = f"flushed({value})"
        if target == "_":
            return f"(void)({value});"
        name, cpp = self.register(target)
        return f"{name} = {value};" if cpp == TYPES[kind] else f"{name} = to<{cpp}, {TYPES[kind]}>({value});"

    def address(self, operand: str) -> str:
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise ValueError(operand)
        return f"({self.value(found[1], 'b64')} + ({found[2] or 0}ll))"

    def instruction(self, words: list[str], o: list[str]) -> str:
        op, rest = words[0], [w for w in words[1:] if w not in IGNORED]
        if not {(op, w) for w in CHANGING & set(rest)} <= {("fma", "rm"), ("cvt", "sat")}:
            raise ValueError(rest)
        self.flushes = "ftz" in rest
        kind = rest[-1] if rest else ""
        if op in PACKED and kind.endswith("x2"):
            return self.packed(f"{op}.NaN" if "NaN" in rest else op, TYPES[kind[:-2]], o)
        method = getattr(self, f"op_{op}", None)
        if method is not None:
            return str(method(rest, o))
        if op in ("add", "sub") and kind[0] == "s":
            kind = f"u{kind[1:]}"  # the same bits, and wraps around in C++ too
        if op in ("add", "sub") and kind in PLAIN:
            return self.put(o[0], kind, f"{self.value(o[1], kind)} {'+-'[op == 'sub']} {self.value(o[2], kind)}")
        if op in UNARY:
            return self.put(o[0], kind, f"{UNARY[op]}({self.value(o[1], kind)})")
        if op in BINARY:
            if re.fullmatch(r"b\d+", kind) and op in ("min", "max", "div"):
                raise ValueError(op)
            if "NaN" in rest:
                op = f"{op}.NaN"
            return self.put(o[0], kind, BINARY[op].format(a=self.value(o[1], kind), b=self.value(o[2], kind),
                                                          t=TYPES[kind]))  # fmt: skip
        raise KeyError(op)

    def packed(self, op: str, half: str, o: list[str]) -> str:
        """The same of two numbers that share a register."""
        numbers = []
        for i in range(2):
            values = (f"as<{half}>(piece<uint16_t, {i}>({self.value(x, 'b32')}))" for x in o[1:])
            numbers.append(f"as<uint16_t>(rounded<{half}>({PACKED[op]}({', '.join(values)})))")
        return self.put(o[0], "b32", f"joined<uint32_t, uint16_t>({{{', '.join(numbers)}}})")

    # Control ------------------------------------------------------------------------------------------------------

    def op_bra(self, rest: list[str], o: list[str]) -> str:
        return f"goto {self.label(o[0])};"

    def op_ret(self, rest: list[str], o: list[str]) -> str:
        return "return;"

    op_exit = op_ret

    def op_trap(self, rest: list[str], o: list[str]) -> str:
        return 'emulator::fail("trap");'

    def op_bar(self, rest: list[str], o: list[str]) -> str:
        if rest == ["warp"]:
            return "warp_barrier();"
        if o[0] != "0" or len(o) > 1:
            raise ValueError("a named barrier")
        return "emulator::block_barrier();"

    op_barrier = op_bar

    def op_fence(self, rest: list[str], o: list[str]) -> str:
        if rest[:2] != ["proxy", "async"]:
            raise ValueError(rest)
        return ";"  # a fiber sees what another wrote before it stopped

    # Moves --------------------------------------------------------------------------------------------------------

    def op_mov(self, rest: list[str], o: list[str]) -> str:
        kind, (target, source) = rest[-1], o
        if target.startswith("{"):
            parts = split(target[1:-1])
            part = f"b{int(kind[1:]) // len(parts)}"
            moved = "; ".join(
                self.put(name, part, f"piece<{TYPES[part]}, {i}>({self.value(source, kind)})").rstrip(";")
                for i, name in enumerate(parts)
            )
            return moved + ";"
        if source.startswith("{"):
            parts = split(source[1:-1])
            part = f"b{int(kind[1:]) // len(parts)}"
            values = ", ".join(self.value(name, part) for name in parts)
            return self.put(target, kind, f"joined<{TYPES[kind]}, {TYPES[part]}>({{{values}}})")
        return self.put(target, kind, self.value(source, kind))

    def op_cvta(self, rest: list[str], o: list[str]) -> str:
        value = self.value(o[1], "u64")
        if "shared" in rest:
            value = f"to_shared({value})" if "to" in rest else f"from_shared({value})"
        return self.put(o[0], "u64", value)

    def op_selp(self, rest: list[str], o: list[str]) -> str:
        kind = rest[-1]
        return self.put(o[0], kind, f"{self.value(o[3], 'pred')} ? {self.value(o[1], kind)} : {self.value(o[2], kind)}")

    def op_setp(self, rest: list[str], o: list[str]) -> str:
        comparison, kind, targets = rest[0], rest[-1], o[0].split("|")
        if kind.endswith("x2"):
            half = kind[:-2]
            code = ""
            for i in range(len(targets)):
                a, b = (f"as<{TYPES[half]}>(piece<uint16_t, {i}>({self.value(x, 'b32')}))" for x in o[1:3])
                code += f"const bool said_{i} = {compared(comparison, half, a, b)};"
            return f"{{ {code} {''.join(self.put(t, 'pred', f'said_{i}') for i, t in enumerate(targets))} }}"
        said = compared(comparison, kind, self.value(o[1], kind), self.value(o[2], kind))
        if combined := rest[1] if rest[1] in ("and", "or", "xor") else None:
            said = f"({said} {dict(xor='!=', **{'and': '&&', 'or': '||'})[combined]} {self.value(o[3], 'pred')})"
        if len(targets) == 1:
            return self.put(targets[0], "pred", said)
        both = self.put(targets[0], "pred", "said") + self.put(targets[1], "pred", "!said")
        return f"{{ const bool said = {said}; {both} }}"

    # Arithmetic ---------------------------------------------------------------------------------------------------

    def op_mul(self, rest: list[str], o: list[str]) -> str:
        kind = rest[-1]
        if rest == ["lo", "s32"]:
            kind = "u32"
        a, b = self.value(o[1], kind), self.value(o[2], kind)
        if "wide" in rest:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return self.put(o[0], wide, f"({TYPES[wide]}){a} * ({TYPES[wide]}){b}")
        if "hi" in rest:
            return self.put(o[0], kind, f"high_product({a}, {b})")
        if kind in PLAIN:
            return self.put(o[0], kind, f"{a} * {b}")
        return self.put(o[0], kind, f"product({a}, {b})")

    def op_mad(self, rest: list[str], o: list[str]) -> str:
        kind = rest[-1]
        a, b = self.value(o[1], kind), self.value(o[2], kind)
        if kind[0] == "f":
            return self.op_fma(rest, o)
        if "wide" in rest:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            product = f"({TYPES[wide]}){a} * ({TYPES[wide]}){b}"
            return self.put(o[0], wide, f"sum<{TYPES[wide]}>({product}, {self.value(o[3], wide)})")
        product = f"high_product({a}, {b})" if "hi" in rest else f"product({a}, {b})"
        return self.put(o[0], kind, f"sum<{TYPES[kind]}>({product}, {self.value(o[3], kind)})")

    def op_bfe(self, rest: list[str], o: list[str]) -> str:
        kind = rest[-1]
        count = ", ".join(self.value(x, "u32") for x in o[2:])
        return self.put(o[0], kind, f"bit_field({self.value(o[1], kind)}, {count})")

    def op_prmt(self, rest: list[str], o: list[str]) -> str:
        if rest != ["b32"]:
            raise ValueError(rest)
        return self.put(o[0], "b32", f"bytes_chosen({', '.join(self.value(x, 'b32') for x in o[1:])})")

    def op_shf(self, rest: list[str], o: list[str]) -> str:
        if rest[0] not in ("l", "r") or rest[1:] != ["wrap", "b32"]:
            raise ValueError(rest)
        low, high, count = (self.value(x, "b32") for x in o[1:])
        both = f"(joined<uint64_t, uint32_t>({{{low}, {high}}})"
        if rest[0] == "l":
            return self.put(o[0], "b32", f"uint32_t({both} << (({count}) & 31)) >> 32)")
        return self.put(o[0], "b32", f"uint32_t({both} >> (({count}) & 31)))")

    def op_fma(self, rest: list[str], o: list[str]) -> str:
        kind = rest[-1]
        if rest[0] == "rm":
            return self.put(o[0], kind, f"fma_down({', '.join(self.value(x, kind) for x in o[1:])})")
        if rest[0] != "rn":
            raise ValueError(rest[0])
        if kind == "f32":
            return self.put(o[0], kind, f"__builtin_fmaf({', '.join(self.value(x, kind) for x in o[1:])})")
        return self.put(o[0], kind, f"fused({', '.join(self.value(x, kind) for x in o[1:])})")

    def op_cvt(self, rest: list[str], o: list[str]) -> str:
        to, source = rest[-2], rest[-1]
        how = rest[:-2]
        if to == "tf32":
            if how != ["rna"]:
                raise ValueError(how)
            return self.put(o[0], "b32", f"xsep::cuda::to_tf32({self.value(o[1], 'f32')})")
        if to in ("f16x2", "bf16x2"):
            half = TYPES[to[:-2]]
            high, low = (f"rounded<{half}>({self.value(x, source)})" for x in o[1:])
            return self.put(o[0], "b32", f"joined<uint32_t, uint16_t>({{as<uint16_t>({low}), as<uint16_t>({high})}})")
        value = self.value(o[1], source)
        if to[0] in "us" and source[0] in "fb":
            rounding = next(h for h in how if h in ("rni", "rzi", "rmi", "rpi"))
            return self.put(o[0], to, f"to_integer<{TYPES[to]}>({rounding}({value}))")
        if rounding := [h for h in how if h in ("rni", "rzi", "rmi", "rpi")]:
            return self.put(o[0], to, f"{rounding[0]}({value})")
        value = f"saturated({value})" if "sat" in how else value
        return self.put(o[0], to, f"rounded<{TYPES[to]}>({value})")

    # Memory -------------------------------------------------------------------------------------------------------

    def op_ld(self, rest: list[str], o: list[str]) -> str:
        space = next((w for w in rest if w in ("global", "shared", "param", "local", "const")), "generic")
        kind, targets = rest[-1], split(o[0][1:-1]) if o[0].startswith("{") else [o[0]]
        pointer = f"{space}_load({self.address(o[1])}, {len(targets)} * sizeof({TYPES[kind]}))"
        loads = "".join(self.put(t, kind, f"at<{TYPES[kind]}>(from, {i})") for i, t in enumerate(targets))
        return f"{{ const unsigned char* from = {pointer}; {loads} }}"

    op_ldu = op_ld

    def op_st(self, rest: list[str], o: list[str]) -> str:
        space = next((w for w in rest if w in ("global", "shared", "local")), "generic")
        kind, sources = rest[-1], split(o[1][1:-1]) if o[1].startswith("{") else [o[1]]
        pointer = f"{space}_store({self.address(o[0])}, {len(sources)} * sizeof({TYPES[kind]}))"
        stores = "".join(f"store(into, {i}, {self.value(s, kind)});" for i, s in enumerate(sources))
        return f"{{ unsigned char* into = {pointer}; {stores} }}"

    def op_createpolicy(self, rest: list[str], o: list[str]) -> str:
        return self.put(o[0], "b64", "0")  # of caches alone

    def op_cp(self, rest: list[str], o: list[str]) -> str:
        if rest[:2] == ["async", "commit_group"]:
            return "emulator::copy_async_commit();"
        if rest[:2] == ["async", "wait_group"]:
            return f"emulator::copy_async_wait({o[0]});"
        if rest[0] != "async" or "bulk" in rest or "shared" not in rest or "global" not in rest:
            raise ValueError(rest)
        read = self.value(o[3], "b32") if len(o) > 3 else o[2]
        return f"copy_async({self.address(o[0])}, {self.address(o[1])}, {o[2]}, {read});"

    # Of a whole warp ------------------------------------------------------------------------------------------------

    def op_shfl(self, rest: list[str], o: list[str]) -> str:
        how, targets = rest[0], o[0].split("|")
        values = ", ".join(self.value(x, "b32") for x in o[1:5])
        code = f"bool inside; {self.put(targets[0], 'b32', f'shuffle_{how}({values}, inside)')}"
        if len(targets) > 1:
            code += self.put(targets[1], "pred", "inside")
        return f"{{ {code} }}"

    def op_vote(self, rest: list[str], o: list[str]) -> str:
        if rest != ["any", "pred"]:
            raise ValueError(rest)
        return self.put(o[0], "pred", f"__any_sync({self.value(o[2], 'b32')}, {self.value(o[1], 'pred')})")

    def op_redux(self, rest: list[str], o: list[str]) -> str:
        how, kind = rest
        mine, mask = self.value(o[1], kind), self.value(o[2], "b32")
        return self.put(o[0], kind, f"reduced({mine}, {mask}, {REDUCTIONS[how].format(t=TYPES[kind])})")

    def op_ldmatrix(self, rest: list[str], o: list[str]) -> str:
        if "m8n8" not in rest or rest[-1] != "b16":
            raise ValueError(rest)
        targets = split(o[0][1:-1])
        name = f"load_matrices<{len(targets)}, {'true' if 'trans' in rest else 'false'}>"
        loads = "".join(self.put(t, "b32", f"loaded[{i}]") for i, t in enumerate(targets))
        return f"{{ uint32_t loaded[4]; {name}(loaded, {self.address(o[1])}); {loads} }}"

    def op_stmatrix(self, rest: list[str], o: list[str]) -> str:
        if "m8n8" not in rest or rest[-1] != "b16":
            raise ValueError(rest)
        sources = split(o[1][1:-1])
        name = f"store_matrices<{len(sources)}, {'true' if 'trans' in rest else 'false'}>"
        return f"{name}({self.address(o[0])}, {{{', '.join(self.value(x, 'b32') for x in sources)}}});"

    def op_mma(self, rest: list[str], o: list[str]) -> str:
        shape, kinds = rest[0], rest[3:]
        if rest[1:3] != ["row", "col"] or kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2]:
            raise ValueError(rest)
        d, a, b, c = (split(x[1:-1]) for x in o)
        call = {
            ("m16n8k16", "bf16"): "mma_m16n8k16(d, a, b, __nv_bfloat16())",
            ("m16n8k16", "f16"): "mma_m16n8k16(d, a, b, __half())",
            ("m16n8k8", "tf32"): "mma_m16n8k8_tf32(d, a, b)",
            ("m16n8k8", "bf16"): "mma_m16n8k8(d, a[0], a[1], b[0], __nv_bfloat16())",
            ("m16n8k8", "f16"): "mma_m16n8k8(d, a[0], a[1], b[0], __half())",
        }[shape, kinds[1]]
        start = ", ".join(self.value(x, "f32") for x in c)
        operands = "".join(
            f"const uint32_t {name}[{len(x)}] = {{{', '.join(self.value(y, 'b32') for y in x)}}};"
            for name, x in (("a", a), ("b", b))
        )
        done = "".join(self.put(t, "f32", f"d[{i}]") for i, t in enumerate(d))
        return f"{{ float d[4] = {{{start}}}; {operands} xsep::cuda::{call}; {done} }}"

    def op_wgmma(self, rest: list[str], o: list[str]) -> str:
        if rest[0] != "mma_async":
            wait = f"emulator::read_async_wait({', '.join(o)});"
            return {"fence": ";", "commit_group": "emulator::read_async_commit();", "wait_group": wait}[rest[0]]
        _, shape, kind, *of = rest
        depth = {"bf16": "16", "f16": "16", "tf32": "8"}[of[0]]
        found = re.fullmatch(rf"m64n(\d+)k{depth}", shape)
        in_registers = o[1].startswith("{")
        # Whether A, where it is no register, and B are transposed: of 16-bit types alone.
        flags = 0 if depth == "8" else 1 if in_registers else 2
        if found is None or kind != "f32" or of[0] != of[1] or o[4:6] != ["1", "1"] or len(o) != 6 + flags:
            raise ValueError(rest)
        transposed = [f"{bool(int(flag))}".lower() for flag in o[6:]] or ["false", "false"]
        cpp = "float" if of[0] == "tf32" else TYPES[of[0]]
        targets = split(o[0][1:-1])
        if len(targets) != int(found[1]) // 2:
            raise ValueError(o[0])
        start = ", ".join(self.value(x, "f32") for x in targets)
        if in_registers:
            a = f"const uint32_t a[4] = {{{', '.join(self.value(x, 'b32') for x in split(o[1][1:-1]))}}};"
        else:
            a = f"uint32_t a[4]; tile_fragment<{cpp}>(a, {self.value(o[1], 'b64')}, {transposed[0]});"
        b = f"{self.value(o[2], 'b64')}, {transposed[-1]}"
        call = f'warp_group_mma<{cpp}, {found[1]}>("wgmma.{shape}.{of[0]}", d, a, {b});'
        done = "".join(self.put(t, "f32", f"d[{i}]") for i, t in enumerate(targets))
        cleared = f"if (!{self.value(o[3], 'pred')}) std::fill(std::begin(d), std::end(d), 0.0f);"
        return f"{{ float d[{len(targets)}] = {{{start}}}; {cleared} {a} {call} {done} }}"


#: Types whose sums and products are those of C++, and casts that keep the bits.
PLAIN = ("f32", "f64", "u32", "u64")
CASTS = {(f"uint{bits}_t", f"int{bits}_t") for bits in (16, 32, 64)}
REDUCTIONS = {
    "add": "sum<{t}>", "min": "smaller<{t}>", "max": "larger<{t}>", "and": "std::bit_and<{t}>()",
    "or": "std::bit_or<{t}>()", "xor": "std::bit_xor<{t}>()",
}  # fmt: skip
UNARY = {
    "neg": "negated", "abs": "magnitude", "not": "inverted", "ex2": "power_of_two", "lg2": "std::log2",
    "rcp": "reciprocal", "rsqrt": "reciprocal_root", "sqrt": "std::sqrt", "tanh": "std::tanh", "popc": "population",
    "clz": "leading_zeros",
}  # fmt: skip
BINARY = {
    "add": "sum<{t}>({a}, {b})", "sub": "difference<{t}>({a}, {b})", "and": "{a} & {b}", "or": "{a} | {b}",
    "xor": "{a} ^ {b}", "min": "smaller({a}, {b})", "max": "larger({a}, {b})",
    "min.NaN": "xsep::cuda::min_nan({a}, {b})", "max.NaN": "xsep::cuda::max_nan({a}, {b})", "div": "quotient({a}, {b})",
    "rem": "{a} % {b}", "shl": "shifted_left({a}, {b})", "shr": "shifted_right({a}, {b})",
    "copysign": "std::copysign({b}, {a})",
}  # fmt: skip


#: What two numbers in one register may go through.
PACKED = {
    "add": "sum", "sub": "difference", "mul": "product", "fma": "fused", "min": "smaller", "max": "larger",
    "min.NaN": "xsep::cuda::min_nan", "max.NaN": "xsep::cuda::max_nan", "neg": "negated", "abs": "magnitude",
}  # fmt: skip


def compared(comparison: str, kind: str, a: str, b: str) -> str:
    """Whether ``a`` compares to ``b`` so; of NaN that is false but where the comparison's name says otherwise."""
    if comparison in ("num", "nan"):
        return f"{'!' if comparison == 'num' else ''}(is_nan({a}) || is_nan({b}))"
    if comparison.endswith("u") and comparison[:-1] in COMPARISONS:
        return f"(is_nan({a}) || is_nan({b}) || {a} {COMPARISONS[comparison[:-1]]} {b})"
    if comparison == "ne" and "f" in kind:
        return f"(!is_nan({a}) && !is_nan({b}) && {a} != {b})"
    return f"({a} {COMPARISONS[comparison]} {b})"


def kernel_key(mangled: str) -> str:
    """The same from every compiler: of an anonymous namespace, nvcc writes in its name which file it is from."""
    found = re.search(r"(\d+)_GLOBAL__N_", mangled)
    if found is None:
        return mangled
    return f"{mangled[: found.start()]}12_GLOBAL__N_1{mangled[found.end(1) + int(found[1]) :]}"
