//! Faults put into the kernels on purpose: each must be found. What finds what is told in docs/kernels.md.

use std::process::Command;

use anyhow::{bail, Result};

use crate::compile::Edit;
use crate::conformance;
use crate::device::Dtype;
use crate::kernels::{kernels, ENGINE_COPIES, THREADS_COPY};

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
}

/// All but decode on tensor cores.
const SEAL: Part = Part {
    arch: ENGINE_COPIES,
    dtype: Dtype::F32,
    without: &["decode_mma"],
    edits: &[],
};
/// Decode on tensor cores, for f16.
const MMA_80: Part = Part {
    arch: THREADS_COPY,
    dtype: Dtype::F16,
    without: &[],
    edits: &[
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
    ],
};
const MMA_90: Part = Part {
    arch: ENGINE_COPIES,
    ..MMA_80
};

const FAULTS: [Fault; 21] = [
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
        if let Err(found) = conformance::judge(&kernels, true, &[part.dtype]) {
            return Ok(Some(format!("{found:#}")));
        }
    }
    Ok(None)
}
