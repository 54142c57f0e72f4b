"""Reading what XLA says about a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from jaxserve.evaluation.compiled import (
    collectives,
    computations,
    count_launches,
    custom_calls,
    moved_bytes,
    num_copies,
    num_launched,
    num_rematerialized,
)

THUNKS = """\
000: kCommandBuffer [source       | next=129 (1)]
    001: kCustomKernel       [source        | next=006 (5)] loop_fusion grid: [64, 1, 1] threads: [128, 1, 1]
    008: kCopy               [source        | next=010 (2)] kCopy
129: kConditional   [prev=000 (1) | next=130 (1)]
  false_branch:
    000: kCommandBuffer [source       | next=104 (1)]
        086: kCustomKernel [source       | next=087 (1)] loop_fusion_6 grid: [1, 1, 1] threads: [128, 1, 1]
    104: kConditional   [prev=000 (1) | next=123 (2)]
  true_branch:
    128: kCopy [source | sink] kCopy
130: kCustomKernel  [prev=129 (1) | next=157 (2)] loop_fusion_7 grid: [1, 1, 1] threads: [128, 1, 1]
"""

HLO = """\
  %copy.37 = f32[128,32000]{1,0} copy(%get-tuple-element.255), metadata={scheduling_name="copy.37"}
  %copy-start.1 = (f32[128,32000]{1,0}, f32[128,32000]{1,0}, u32[]) copy-start(%copy.37)
  %copy-done.1 = f32[128,32000]{1,0} copy-done(%copy-start.1)
  %copy.65 = s32[128]{0} copy(%get-tuple-element.259)
  %fusion.1 = f32[128,32000]{1,0} fusion(%copy.37), kind=kLoop, metadata={op_name="copy(x)"}
  %call.1 = (bf16[8,4]{1,0}) custom-call(%fusion.1), custom_call_target="triton_kernel_call_ffi"
  %call.2 = (bf16[8,4]{1,0}) custom-call(%call.1), custom_call_target="triton_kernel_call_ffi"
  %call.3 = bf16[8,4]{1,0} custom-call(%call.2), custom_call_target="__cublas$lt$matmul"
"""

COLLECTIVES = """\
  %all-reduce-start.1 = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) all-reduce-start(%dot.1), metadata={op_name="jit(f)/g/dot"}
  %all-reduce-done.1 = bf16[8,4]{1,0} all-reduce-done(%all-reduce-start.1), metadata={op_name="jit(f)/g/dot"}
  %all-reduce.2 = bf16[8,4]{1,0} all-reduce(%dot.2), metadata={op_name="jit(f)/h/dot"}
  %gathered = (s32[8]{0}, /*index=1*/f32[8]{0}) all-gather(%tokens, %all-reduce.2), metadata={op_name="jit(f)/gather"}
  ROOT %all-to-all.1 = f32[8,4]{1,0} all-to-all(%gathered), metadata={op_name="jit(f)/g/all_to_all"}
  %fusion.1 = f32[8,4]{1,0} fusion(%all-reduce.2), metadata={op_name="jit(f)/g/all_reduce(x)"}
"""


PROGRAM = """\
%body (arg: (f32[8], s32[])) -> (f32[8], s32[]) {
  %arg = (f32[8]{0}, s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%arg), index=0
  %sum.remat = f32[] fusion(%x), kind=kInput, metadata={op_name="jit(f)/g/sum"}
  ROOT %tuple = (f32[8]{0}, s32[]) tuple(%x, %sum.remat)
}

ENTRY %main (cache: bf16[100,4], rows: bf16[8,4]) -> bf16[8,4] {
  %cache = bf16[100,4]{1,0} parameter(0), metadata={op_name="jit(f)/g/cache"}
  %rows = bf16[8,4]{1,0} parameter(1)
  %dot.remat2 = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%rows, %rows), metadata={op_name="jit(f)/g/dot"}
  %dot.3 = f32[8,4]{1,0} get-tuple-element(%dot.remat2), index=0
  %both = (bf16[8,4]{1,0}, /*index=1*/u32[2]{0}) fusion(%dot.3, %cache), calls=%fused, metadata={op_name="jit(f)/h"}
  %while = (f32[8]{0}, s32[]) while(%both), body=%body
  ROOT %last = bf16[8,4]{1,0} fusion(%both#1), metadata={op_name="jit(f)/rematted"}
}
"""


def test_what_a_program_launches_and_moves() -> None:
    """Parameters and tuples are not launched; the cache's bytes, workspaces, loops, and other elements do not count."""
    parts = computations(PROGRAM)
    assert list(parts) == ["body", "ENTRY"]
    assert parts["ENTRY"]["both"].operands == [("dot.3", None), ("cache", None)]
    assert parts["ENTRY"]["last"].operands == [("both", 1)]
    assert moved_bytes(parts["body"]) == 8 * 4 + 4
    product, both, last = 2 * 64 + 128, 128 + 64 + 8, 8 + 64
    assert moved_bytes(parts["ENTRY"], without=100) == product + both + last
    assert moved_bytes(parts["ENTRY"]) == product + both + last + 100 * 4 * 2
    assert (num_launched(PROGRAM), num_launched(PROGRAM, "/g/")) == (4, 1)
    assert num_rematerialized(PROGRAM) == 2


def test_launches_outside_and_inside_of_graphs() -> None:
    assert count_launches(THUNKS) == (2, 2, 1)
    assert count_launches("000: kCommandBuffer [source | sink] \n    001: kCopy [source | sink] kCopy\n") == (1, 0, 0)
    assert count_launches("") == (0, 0, 0)


def test_an_asynchronous_launch_is_one() -> None:
    start = "001: kAsyncStart [source | sink] async_id=1\n    002: kAllReduce [source | sink] kAllReduce\n"
    assert count_launches(f"{start}003: kAsyncDone [source | sink] async_id=1\n") == (0, 1, 0)


def test_copies_of_a_shape() -> None:
    assert num_copies(HLO, (128, 32000)) == 2
    assert num_copies(HLO, (128,)) == 1
    assert num_copies(HLO, (32000,)) == 0


def test_custom_calls_by_target() -> None:
    assert custom_calls(HLO) == {"triton_kernel_call_ffi": 2, "__cublas$lt$matmul": 1}


def test_collectives_by_kind() -> None:
    assert collectives(COLLECTIVES) == {"all-reduce": 2, "all-gather": 1, "all-to-all": 1}
    assert collectives(COLLECTIVES, "/g/") == {"all-reduce": 1, "all-to-all": 1}
    assert collectives(HLO) == {}


CACHED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxserve.engine.compile import use_persistent_cache
from jaxserve.evaluation.compiled import compile_and_explain
use_persistent_cache(Path(sys.argv[1]))
jax.monitoring.register_event_listener(lambda event, **_: print(event))
lowered = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((64, 64)))
for _ in range(2):
    compiled, launches = compile_and_explain(lowered)
    print("made", *compiled(jnp.ones((64, 64))).shape, *launches)
"""


def test_programs_are_compiled_even_if_they_are_in_the_cache(tmp_path: Path) -> None:
    """From the cache they would come without an explanation. In a process of its own: the cache is the process's."""
    done = subprocess.run([sys.executable, "-c", CACHED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("made 64 64 0 0 0\n") == 2
    assert "cache_misses" in done.stdout
    assert "cache_hits" not in done.stdout.partition("made")[2]
