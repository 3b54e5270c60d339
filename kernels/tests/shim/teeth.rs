//! Faults put into the kernels on purpose: each must be found. What finds what is told in docs/kernels.md.

use anyhow::Result;

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

const FAULTS: [Fault; 14] = [
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
        let found = judge(fault).expect("compiles");
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
