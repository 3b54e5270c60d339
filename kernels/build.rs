//! Compiles `cuda/*.cu` for every architecture, if the feature `cuda` is on: one fat binary each.
//!
//! What each kernel takes (registers, shared memory, spills) is written beside them, `resources.txt`; a tensor-core kernel
//! for decoding that spills is an error.
//!
//! nvcc is looked for in `CUDA_HOME`, `CUDA_PATH` and `PATH`. `CUDA_COMPUTE_CAP` (as 80, 86, 89 or 90) builds for one
//! architecture only.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Sources, and how they round: codes and what is kept of queries must be equal bit for bit to the CPU's, so that `seal`
/// and `store` may not contract products and sums; weights below the smallest normal number may be 0 in attention.
const SOURCES: [(&str, &str); 8] = [
    ("probe", "--fmad=true"),
    ("count", "--fmad=true"),
    ("store", "--fmad=false"),
    ("seal", "--fmad=false"),
    ("decode", "--fmad=true"),
    ("decode_mma", "--ftz=true"),
    ("prompt", "--fmad=true"),
    ("prompt_mma", "--ftz=true"),
];
/// Machine code for each; PTX of the last for what comes after.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=CUDA_PATH");
    println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        println!("cargo:warning={message}");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let nvcc = nvcc();
    let out = std::env::var_os("OUT_DIR").map(PathBuf::from);
    let out = out.ok_or("cargo sets OUT_DIR")?;
    let jobs = SOURCES.map(|(name, rounding)| {
        let mut command = Command::new(&nvcc);
        command
            .args(["-std=c++17", "-O3", "-Werror", "all-warnings", "-fatbin"])
            .arg("--resource-usage")
            .arg(rounding)
            .args(targets())
            .arg("-o")
            .arg(out.join(format!("{name}.fatbin")))
            .arg(format!("cuda/{name}.cu"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        (name, command.spawn())
    });
    let mut resources = Vec::new();
    for (name, job) in jobs {
        let job = job.map_err(|error| {
            format!(
                "nvcc does not start ({}: {error}): install the CUDA toolkit, or set CUDA_HOME to one, \
                 or fetch the compiler alone with `cargo fetch-nvcc`",
                nvcc.display()
            )
        })?;
        let output = job.wait_with_output().map_err(|error| error.to_string())?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        if !output.status.success() {
            return Err(format!("nvcc could not compile cuda/{name}.cu: {text}"));
        }
        resources.extend(kernels_in(&text));
    }
    if let Some(kernel) = resources.iter().find(|k| k.is_tuned() && k.stack > 0) {
        return Err(format!("a tensor-core kernel spills registers: {kernel}"));
    }
    resources.sort_by(|a, b| (&a.name, &a.arch).cmp(&(&b.name, &b.arch)));
    let lines: String = resources.iter().map(|k| format!("{k}\n")).collect();
    std::fs::write(out.join("resources.txt"), lines).map_err(|error| error.to_string())
}

/// What ptxas says of a kernel.
struct Resources {
    name: String,
    arch: String,
    registers: usize,
    /// Bytes of local memory: spills, and arrays that are indexed at run time.
    stack: usize,
    shared: usize,
}

impl Resources {
    fn is_tuned(&self) -> bool {
        self.name.starts_with("ott_decode_mma")
    }
}

impl std::fmt::Display for Resources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, arch) = (&self.name, &self.arch);
        write!(f, "{name} {arch} registers {} ", self.registers)?;
        write!(f, "local {} static shared {}", self.stack, self.shared)
    }
}

fn kernels_in(text: &str) -> Vec<Resources> {
    let parts = text.split("Compiling entry function '").skip(1);
    let parts = parts.filter_map(|part| {
        let (name, rest) = part.split_once('\'')?;
        Some(Resources {
            name: name.to_string(),
            arch: rest.split('\'').nth(1)?.to_string(),
            registers: after(rest, "Used ")?,
            stack: number_before(rest, " bytes stack frame")?,
            shared: number_before(rest, " bytes smem").unwrap_or(0),
        })
    });
    parts.collect()
}

fn after(text: &str, word: &str) -> Option<usize> {
    let (_, rest) = text.split_once(word)?;
    rest.split_whitespace().next()?.parse().ok()
}

fn number_before(text: &str, words: &str) -> Option<usize> {
    let (before, _) = text.split_once(words)?;
    before.split_whitespace().next_back()?.parse().ok()
}

fn nvcc() -> PathBuf {
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists())
        .unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn targets() -> Vec<String> {
    let code = |a: &str| format!("-gencode=arch=compute_{a},code=sm_{a}");
    if let Ok(only) = std::env::var("CUDA_COMPUTE_CAP") {
        return vec![code(&only)];
    }
    let last = ARCHITECTURES[ARCHITECTURES.len() - 1];
    let ptx = format!("-gencode=arch=compute_{last},code=compute_{last}");
    ARCHITECTURES.iter().map(|a| code(a)).chain([ptx]).collect()
}
