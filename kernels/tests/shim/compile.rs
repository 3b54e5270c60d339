//! Kernels as a library of the host: `cuda/*.cu` and the shim (`shim/`), by the machine's C++ compiler.

use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{bail, ensure, Context, Result};

/// What the compiler adds to watch the kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Watch {
    /// Indices outside of arrays, misaligned vectors.
    Indices,
    /// Every address, and whatever else C++ leaves undefined.
    Addresses,
    /// Which threads' accesses no barrier orders.
    Races,
}

impl Watch {
    /// As `OTT_SHIM` names it.
    pub fn of_environment() -> Result<Self> {
        match std::env::var("OTT_SHIM").as_deref() {
            Err(_) | Ok("indices") => Ok(Self::Indices),
            Ok("addresses") => Ok(Self::Addresses),
            Ok("races") => Ok(Self::Races),
            Ok(other) => bail!("OTT_SHIM is indices, addresses or races, not {other}"),
        }
    }

    /// As [`Watch::of_environment`] reads it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Indices => "indices",
            Self::Addresses => "addresses",
            Self::Races => "races",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Indices => &["-fsanitize=bounds,alignment"],
            Self::Addresses => &[
                "-fsanitize=address,undefined",
                "-fno-sanitize-recover=all",
                // The runtime says which thread it was.
                "-fsanitize-recover=bounds,alignment",
            ],
            Self::Races => &["-fsanitize=thread"],
        }
    }

    /// For the runtime. What it does for a kernel is no access of the kernel's.
    fn runtime_flags(self) -> &'static [&'static str] {
        match self {
            Self::Indices => &[],
            Self::Addresses => &["-DSHIM_ADDRESSES", "-fsanitize=address"],
            Self::Races => &["-DSHIM_RACES"],
        }
    }
}

/// A change to a kernel: in this file, this text, which is there once, becomes that.
pub type Edit<'a> = (&'a str, &'a str, &'a str);

/// What is compiled.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Build<'a> {
    /// Folder of the kernels, below the package.
    pub folder: &'a str,
    /// As `__CUDA_ARCH__` says it: 800 or 900.
    pub arch: u32,
    /// What the compiler adds.
    pub watch: Watch,
    /// Sources that are left out.
    pub without: &'a [&'a str],
    /// Changes to the kernels.
    pub edits: &'a [Edit<'a>],
}

/// Compile what is not compiled yet. A library stays until its sources or flags change.
///
/// # Errors
/// If an edit's text is not there once, or the compiler fails.
pub fn library(build: &Build<'_>) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shim = package.join("shim");
    let mut sources = read(&package.join(build.folder))?;
    let runtime = [read(&shim)?, read(&shim.join("include"))?].concat();
    let mut hash = DefaultHasher::new();
    (build, &sources, &runtime, FLAGS).hash(&mut hash);
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("shim-{:016x}", hash.finish()));
    let library = folder.join("kernels.so");
    if library.exists() {
        return Ok(library);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    for (file, from, to) in build.edits {
        let source = sources.iter_mut().find(|(name, _)| name == file);
        let (_, text) = source.with_context(|| format!("there is no {file}"))?;
        ensure!(
            text.matches(from).count() == 1,
            "{file} does not have once: {from}"
        );
        *text = text.replace(from, to);
    }
    for (name, text) in &sources {
        // The shim has its own.
        if name != "ptx.cuh" {
            fs::write(folder.join(name), for_host(text))?;
        }
    }
    let compiler = Compiler {
        build,
        shim: &shim,
        folder: &folder,
    };
    let kernels = sources
        .iter()
        .filter_map(|(name, _)| name.strip_suffix(".cu"))
        .filter(|name| !build.without.contains(name));
    let mut objects = Vec::new();
    for name in kernels {
        for part in compiler.wrap(name)? {
            let source = folder.join(format!("{part}.cpp"));
            objects.push((
                folder.join(format!("{part}.o")),
                compiler.object(&part, &source, build.watch.flags()),
            ));
        }
    }
    for name in ["runtime", "fibre"] {
        let source = shim.join(format!("{name}.cpp"));
        objects.push((
            folder.join(format!("{name}.o")),
            compiler.object(name, &source, build.watch.runtime_flags()),
        ));
    }
    run_all(objects.iter_mut().map(|(_, command)| command))?;
    let whole = folder.join("kernels.so.new");
    let mut link = compiler.command();
    link.args(build.watch.flags())
        .args([
            "-shared",
            "-Wl,-Bsymbolic",
            "-Wl,-z,nodelete,-z,muldefs",
            "-o",
        ])
        .arg(&whole);
    link.args(objects.iter().map(|(object, _)| object));
    run_all([&mut link].into_iter())?;
    fs::rename(whole, &library)?;
    Ok(library)
}

/// The library of a sanitizer, which must be in a process before others.
///
/// # Errors
/// If the compiler has none.
pub fn sanitizer(watch: Watch) -> Result<PathBuf> {
    let name = match watch {
        Watch::Races => "libtsan.so",
        _ => "libasan.so",
    };
    let output = Command::new(compiler())
        .arg(format!("-print-file-name={name}"))
        .output()?;
    let path = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    ensure!(path.is_absolute(), "the C++ compiler has no {name}");
    Ok(path)
}

fn compiler() -> OsString {
    std::env::var_os("CXX").unwrap_or_else(|| "g++".into())
}

const FLAGS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-march=native",
    "-fPIC",
    // Each library has its own shared memory.
    "-fno-gnu-unique",
    // As written: one rounding for each operation.
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    // What nvcc warns of is an error already.
    "-w",
    "-D__CUDACC__",
];

/// So that a few compilers work side by side.
const KERNELS_OF_A_PART: usize = 10;
const NO_COMPILER: &str = "the kernels' tests without a GPU need g++, or what CXX names";

struct Compiler<'a> {
    build: &'a Build<'a>,
    shim: &'a Path,
    folder: &'a Path,
}

impl Compiler<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(compiler());
        command.args(FLAGS).current_dir(self.folder);
        // A sanitizer is in this process, not in the compiler's.
        command.env_remove("LD_PRELOAD");
        command.arg(format!("-D__CUDA_ARCH__={}", self.build.arch));
        command.arg("-I").arg(self.shim.join("include"));
        command.args(["-include", "cuda_runtime.h"]);
        command
    }

    /// Files that make each kernel of `name.cu` one that can be found and launched, some kernels in each; their names.
    fn wrap(&self, name: &str) -> Result<Vec<String>> {
        let mut command = self.command();
        let command = command.args(["-E", "-x", "c++"]).arg(format!("{name}.cu"));
        let output = command.output().context(NO_COMPILER)?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{name}.cu: {words}");
        let text = String::from_utf8_lossy(&output.stdout);
        // As `__global__` is defined in cuda_runtime.h.
        let found = text.split("inline __attribute__((unused)) void").skip(1);
        let kernels: Vec<&str> = found.filter_map(|rest| rest.split('(').next()).collect();
        let parts = kernels.chunks(KERNELS_OF_A_PART).enumerate();
        parts
            .map(|(i, kernels)| {
                let lines = kernels
                    .iter()
                    .map(|kernel| format!("SHIM_KERNEL({})\n", kernel.trim()));
                let text = format!("#include \"{name}.cu\"\n{}", lines.collect::<String>());
                let part = format!("{name}-{i}");
                fs::write(self.folder.join(format!("{part}.cpp")), text)?;
                Ok(part)
            })
            .collect()
    }

    fn object(&self, name: &str, source: &Path, watch: &[&str]) -> Command {
        let mut command = self.command();
        command.args(watch).arg("-c").arg(source);
        command.arg("-o").arg(format!("{name}.o"));
        command
    }
}

/// Names of one library are its own, also for the sanitizers; dynamic shared memory is the shim's.
fn for_host(text: &str) -> String {
    text.replace("namespace ott {\n", "namespace ott { inline namespace {\n")
        .replace("}  // namespace ott\n", "} }  // namespace ott\n")
        .replace("extern __shared__", "extern")
}

fn read(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let (Some(name), Some(kind)) = (path.file_name(), path.extension()) else {
            continue;
        };
        if ["cu", "cuh", "h", "cpp"]
            .iter()
            .any(|source| kind == *source)
        {
            let name = name.to_string_lossy().into_owned();
            files.push((name, fs::read_to_string(&path)?));
        }
    }
    files.sort();
    Ok(files)
}

fn run_all<'a>(commands: impl Iterator<Item = &'a mut Command>) -> Result<()> {
    let mut running = Vec::new();
    for command in commands {
        let child = command.spawn();
        running.push(child.context(NO_COMPILER)?);
    }
    for mut child in running {
        ensure!(
            child.wait()?.success(),
            "the C++ compiler failed; its own words are above"
        );
    }
    Ok(())
}
