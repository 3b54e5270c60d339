//! Faults put into the kernels on purpose: each must be found. What finds what is told in docs/kernels.md.

use std::process::Command;

use anyhow::{bail, Result};

use crate::compile::Edit;
use crate::conformance;
use crate::device::Dtype;
use crate::kernels::{kernels, ENGINE_COPIES, THREADS_COPY};
use crate::prompts;

/// What is wrong, and where.
struct Fault {
    name: &'static str,
    part: Part,
    edit: Edit<'static>,
}

/// What has to be compiled and judged to see it.
#[derive(Clone, Copy)]
struct Part {
    arch: u32,
    dtype: Dtype,
    without: &'static [&'static str],
    edits: &'static [Edit<'static>],
    judge: Judge,
}

/// Which suite.
#[derive(Clone, Copy)]
enum Judge {
    Decode,
    Prompts,
}

/// All but decode on tensor cores.
const SEAL: Part = Part {
    arch: ENGINE_COPIES,
    dtype: Dtype::F32,
    without: &["decode_mma", "prompt_mma"],
    edits: &[],
    judge: Judge::Decode,
};
/// Prompts, the clear kernel.
const CLEAR_PROMPTS: Part = Part {
    arch: THREADS_COPY,
    dtype: Dtype::F32,
    without: &["decode_mma", "prompt_mma"],
    edits: &[],
    judge: Judge::Prompts,
};
/// Prompts on tensor cores, for f16.
const PROMPTS: Part = Part {
    arch: THREADS_COPY,
    dtype: Dtype::F16,
    without: &[],
    edits: &ONLY_F16,
    judge: Judge::Prompts,
};
/// Less to compile.
const ONLY_F16: [Edit<'static>; 4] = [
    (
        "decode_mma.cu",
        "OTT_DECODE_MMA_BITS(bf16, __nv_bfloat16, 64)",
        "",
    ),
    (
        "decode_mma.cu",
        "OTT_DECODE_MMA_BITS(bf16, __nv_bfloat16, 128)",
        "",
    ),
    (
        "prompt_mma.cu",
        "OTT_PROMPT_MMA_BITS(bf16, __nv_bfloat16, 64)",
        "",
    ),
    (
        "prompt_mma.cu",
        "OTT_PROMPT_MMA_BITS(bf16, __nv_bfloat16, 128)",
        "",
    ),
];

/// Decode on tensor cores, for f16.
const MMA_80: Part = Part {
    arch: THREADS_COPY,
    dtype: Dtype::F16,
    without: &["prompt_mma"],
    edits: &[ONLY_F16[0], ONLY_F16[1]],
    judge: Judge::Decode,
};
const MMA_90: Part = Part {
    arch: ENGINE_COPIES,
    ..MMA_80
};

const FAULTS: [Fault; 39] = [
    Fault {
        name: "no barrier between magnitudes and their ranks",
        part: SEAL,
        edit: ("seal.cu", "__syncthreads_and(t >= group || isfinite(magnitude[t]))", "(t >= group || isfinite(magnitude[t]))"),
    },
    Fault {
        name: "no barrier between channels' errors and their ranks",
        part: SEAL,
        edit: ("seal.cu", "error[c] = sum;\n    }\n    __syncthreads();", "error[c] = sum;\n    }"),
    },
    Fault {
        name: "no barrier between a half warp's codes and their packing",
        part: SEAL,
        edit: ("seal.cu", "__syncwarp();\n        const int bytes", "const int bytes"),
    },
    Fault {
        name: "rotation: written again before all have read",
        part: SEAL,
        edit: ("rotate.cuh", "            __syncthreads();\n#pragma unroll\n            for (int i = 0; i < N; ++i) shared[", "#pragma unroll\n            for (int i = 0; i < N; ++i) shared["),
    },
    Fault {
        name: "padding behind boosted channels is left as it was",
        part: SEAL,
        edit: (
            "seal.cu",
            "i < layout.head_bytes; i += BOOSTERS) group.page[i] = 0;",
            "i < layout.head_bytes; i += BOOSTERS) {}",
        ),
    },
    Fault {
        name: "channels without a rank are all chosen",
        part: SEAL,
        edit: ("seal.cu", "if (isnan(sum)) sum = INFINITY;", ""),
    },
    Fault {
        name: "queries: those of another token are kept",
        part: SEAL,
        edit: ("store.cu", "at % SAMPLED == SAMPLED - 1", "at % SAMPLED == SAMPLED - 2"),
    },
    Fault {
        name: "queries: without them, what was there before is kept",
        part: SEAL,
        edit: ("store.cu", "if (l.weigh && at", "if (l.weigh && q.data != nullptr && at"),
    },
    Fault {
        name: "queries: all channels' errors count alike",
        part: SEAL,
        edit: ("seal.cu", "if (weighed) sum *= square[channel];", ""),
    },
    Fault {
        name: "queries: no barrier between gains and codes",
        part: SEAL,
        edit: ("seal.cu", "k_dim - from);\n        __syncthreads();", "k_dim - from);\n        if (from > 0) __syncthreads();"),
    },
    Fault {
        name: "queries: packed before all codes are there",
        part: SEAL,
        edit: ("seal.cu", "        __syncthreads();\n        for (int j = t; j < width * low", "        for (int j = t; j < width * low"),
    },
    Fault {
        name: "queries: codes of traced tokens are chosen anew",
        part: SEAL,
        edit: ("seal.cu", "            if (stays) {", "            if (false) {"),
    },
    Fault {
        name: "high bits in the wrong plane",
        part: SEAL,
        edit: ("cache.cuh", ">> (j / (n / 8)) & 1;", ">> (7 - j / (n / 8)) & 1;"),
    },
    Fault {
        name: "halves rounded towards zero",
        part: SEAL,
        edit: ("seal.cu", "rintf(__fdiv_rn(x - min, scale))", "ceilf(__fdiv_rn(x - min, scale) - 0.5f)"),
    },
    Fault {
        name: "weights read before all are there",
        part: SEAL,
        edit: ("decode.cu", "p[t] = exp2f(score - max);\n        __syncthreads();", "p[t] = exp2f(score - max);"),
    },
    Fault {
        name: "copies by threads waited for too late",
        part: MMA_80,
        edit: ("decode_mma.cu", "wait_copies<RING - 1>();", "wait_copies<RING>();"),
    },
    Fault {
        name: "copies by threads waited for by each, not by all",
        part: MMA_80,
        edit: ("decode_mma.cu", "wait_copies<RING - 1>();\n            __syncwarp();", "wait_copies<RING - 1>();"),
    },
    Fault {
        name: "the engine waited for in the wrong phase",
        part: MMA_90,
        edit: ("decode_mma.cu", "i / RING & 1);", "(i / RING & 1) ^ 1);"),
    },
    Fault {
        name: "a place filled again while it is read",
        part: MMA_90,
        edit: ("decode_mma.cu", "            __syncwarp();\n            if (page + 1 < count) ring.load(2 * page + 2", "            if (page + 1 < count) ring.load(2 * page + 2"),
    },
    Fault {
        name: "factors read before all are there",
        part: MMA_90,
        edit: ("decode_mma.cu", "        __syncwarp();\n        typename V::template", "        typename V::template"),
    },
    Fault {
        name: "two bytes exchanged",
        part: MMA_90,
        edit: ("codes.cuh", "out[1] = __byte_perm(low01, low23, 0x7632);", "out[1] = __byte_perm(low01, low23, 0x6732);"),
    },
    Fault {
        name: "prompts: the window is read as it is after the step",
        part: CLEAR_PROMPTS,
        edit: ("prompt.cu", "staged<E>(l, row.chunk_before, start + i, head)", "staged<E>(l, row.chunk, start + i, head)"),
    },
    Fault {
        name: "prompts: new tokens see the next one",
        part: CLEAR_PROMPTS,
        edit: ("prompt.cu", "(start + t) * ratio - first,", "(start + t - 1) * ratio - first,"),
    },
    Fault {
        name: "prompts: values are not turned back before new ones",
        part: CLEAR_PROMPTS,
        edit: ("prompt.cu", "if (l.rotate) clear.turn_back();", ""),
    },
    Fault {
        name: "prompts: scores read before all are there",
        part: CLEAR_PROMPTS,
        edit: ("prompt.cu", "p[i][t] = score[i];\n        __syncthreads();", "p[i][t] = score[i];"),
    },
    Fault {
        name: "prompts: traced keys are those of their slots",
        part: CLEAR_PROMPTS,
        edit: ("prompt.cu", "if (place != NONE) return to_float(traced<E>(l, place).k[c]);", ""),
    },
    Fault {
        name: "prompts: a tile overwritten while it is read",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "                // All bytes are there, and nobody reads the tile before.\n                __syncthreads();", ""),
    },
    Fault {
        name: "prompts: a page decoded before its bytes are there",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "                wait_copies<0>();\n                // All", "                wait_copies<1>();\n                // All"),
    },
    Fault {
        name: "prompts: a tile read before it is decoded",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "                decode(l, layout, block, head, half, shared);\n                __syncthreads();", "                decode(l, layout, block, head, half, shared);"),
    },
    Fault {
        name: "prompts: boosted rows decoded beside the others",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "        if (l.boosted > 0) {\n            __syncthreads();", "        if (l.boosted > 0) {"),
    },
    Fault {
        name: "prompts: traced tokens in the other half of a page",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "slots[i] - half * TILE, c", "slots[i], c"),
    },
    Fault {
        name: "prompts: tokens beyond the window have weight",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "if (at + STEP > count || (is_new", "if ((is_new"),
    },
    Fault {
        name: "prompts: new tokens see the next one, on tensor cores",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "token[lane / 4 + 8 * r] + 1 - start", "token[lane / 4 + 8 * r] + 2 - start"),
    },
    Fault {
        name: "prompts: a maximum raised without shrinking what was added",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "n][r % 2 * 2 + i] *= shrink;", "n][r % 2 * 2 + i] *= 1.0f;"),
    },
    Fault {
        name: "prompts: values turned back in the wrong order of channels",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "x[i] = lane & h ? other - x[i] : x[i] + other;", "x[i] = lane & h ? x[i] - other : x[i] + other;"),
    },
    Fault {
        name: "prompts: two codes exchanged",
        part: PROMPTS,
        edit: ("numbers.cuh", "a = __byte_perm(table[0], table[1], places);\n        b = __byte_perm(table[0], table[1], places >> 16);", "b = __byte_perm(table[0], table[1], places);\n        a = __byte_perm(table[0], table[1], places >> 16);"),
    },
    Fault {
        name: "prompts: high bits of the wrong plane",
        part: PROMPTS,
        edit: ("numbers.cuh", "const int bit = (PLANE * p + first) / (N / 8)", "const int bit = PLANE * p / (N / 8)"),
    },
    Fault {
        name: "prompts: parts overlap by a page",
        part: PROMPTS,
        edit: ("prompt_mma.cu", "to = all * (work.split + 1) / splits;", "to = min(all, all * (work.split + 1) / splits + 1);"),
    },
    Fault {
        name: "prompts: parts joined without their maxima",
        part: PROMPTS,
        edit: ("prompt.cu", "weight = exp2f(found.x - to);", "weight = 1.0f;"),
    },
];

#[test]
#[ignore = "minutes: compiles the kernels for each"]
fn faults_are_found() {
    let only = std::env::var("OTT_SHIM_FAULT").unwrap_or_default();
    let mut missed = Vec::new();
    for fault in FAULTS.iter().filter(|fault| fault.name.contains(&only)) {
        let found = alone(fault).expect("compiles");
        println!(
            "{}: {}",
            fault.name,
            found.as_deref().unwrap_or("NOT FOUND")
        );
        if found.is_none() {
            missed.push(fault.name);
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// What [`faults_are_found`] starts: says [`FOUND`] and what the suite says of the fault of this name.
#[test]
#[ignore = "part of others"]
fn fault_of_this_name() {
    let name = std::env::var("OTT_SHIM_FAULT").unwrap_or_default();
    for fault in FAULTS.iter().filter(|fault| fault.name == name) {
        if let Some(found) = judge(fault).expect("compiles") {
            println!("{FOUND}{found}");
        }
    }
}

const FOUND: &str = "found: ";

/// What is said of a fault, in a process of its own: some write where they may not, and end it.
fn alone(fault: &Fault) -> Result<Option<String>> {
    let mut command = Command::new(std::env::current_exe()?);
    let test = ["--exact", "teeth::fault_of_this_name"];
    command
        .args(test)
        .args(["--ignored", "--nocapture"])
        .env("OTT_SHIM_FAULT", fault.name);
    let output = command.output()?;
    let words = String::from_utf8_lossy(&output.stdout);
    let found = words.split_once(FOUND).map(|(_, found)| found);
    let found = found.and_then(|found| found.lines().next());
    match output.status.code() {
        None => Ok(Some(format!("its process: {}", output.status))),
        Some(0) => Ok(found.map(str::to_string)),
        Some(_) => bail!("{}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// What the suite says.
fn judge(fault: &Fault) -> Result<Option<String>> {
    let part = fault.part;
    let edits = [part.edits, &[fault.edit]].concat();
    for seed in [5, 6] {
        let kernels = kernels(part.arch, part.without, &edits, seed)?;
        let judged = match part.judge {
            Judge::Decode => conformance::judge(&kernels, true, &[part.dtype]),
            Judge::Prompts => prompts::judge(&kernels, true, &[part.dtype]),
        };
        if let Err(found) = judged {
            return Ok(Some(format!("{found:#}")));
        }
    }
    Ok(None)
}
