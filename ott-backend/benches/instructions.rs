//! How many instructions the hot loops take, held against what they took: single-steps a child process, so that
//! no tool is needed, other work does not matter and AVX-512 counts too.
//!
//! `RUSTFLAGS="-C target-cpu=x86-64" cargo count-instructions`: built for any x86-64, so that counts are the same on
//! every machine. Compilers differ by some percent: these are of rustc 1.95.

fn main() {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    std::process::exit(counted::run());
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    println!("SKIPPED: instructions are counted on Linux on x86-64 only.");
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod counted {
    use std::hint::black_box;

    use half::f16;
    use ott_backend::cpu::{Full, Keys, Values};
    use ott_backend::rotate::rotate;
    use ott_backend::{Clip, CpuOps};

    /// More than this share above the number below is a failure; fewer never are.
    const TOLERANCE: f64 = 0.15;
    const TOKENS: usize = 128;

    /// Table, loop, instructions of one call on one page.
    const EXPECTED: [(&str, &str, u64); 24] = [
        ("avx2", "keys, head_dim 64, 1 query", 5817),
        ("avx2", "keys, head_dim 64, 3 queries", 13384),
        ("avx2", "keys, head_dim 64, 3 queries, 12 third bits", 19043),
        ("avx2", "keys, head_dim 128, 4 queries", 27215),
        ("avx2", "values, head_dim 64, 3 queries", 12215),
        ("avx2", "values, head_dim 128, 4 queries", 27116),
        ("avx2", "window scores, 32 x 64, 3 queries", 5925),
        ("avx2", "window sums, 32 x 64, 3 queries", 2687),
        ("avx2", "exponentials", 664),
        ("avx2", "quantise, clipped", 20493),
        ("avx2", "quantise", 2247),
        ("avx2", "rotate 64 channels", 747),
        ("avx512", "keys, head_dim 64, 1 query", 1882),
        ("avx512", "keys, head_dim 64, 3 queries", 3102),
        (
            "avx512",
            "keys, head_dim 64, 3 queries, 12 third bits",
            5470,
        ),
        ("avx512", "keys, head_dim 128, 4 queries", 7122),
        ("avx512", "values, head_dim 64, 3 queries", 3072),
        ("avx512", "values, head_dim 128, 4 queries", 7013),
        ("avx512", "window scores, 32 x 64, 3 queries", 5925),
        ("avx512", "window sums, 32 x 64, 3 queries", 2687),
        ("avx512", "exponentials", 665),
        ("avx512", "quantise, clipped", 22036),
        ("avx512", "quantise", 2114),
        ("avx512", "rotate 64 channels", 747),
    ];

    /// Prints every count; the exit status is 1 if one is too large.
    pub fn run() -> i32 {
        let Some(nothing) = count(|| {}) else {
            println!("SKIPPED: this system does not let a process be traced.");
            return 0;
        };
        // Built for one machine, a compiler uses what that one has.
        let judged = !cfg!(target_feature = "avx2");
        if !judged {
            println!("Counted only: built for this machine, not for any x86-64.");
        }
        let mut status = 0;
        for table in ["avx2", "avx512"] {
            let Ok(ops) = CpuOps::named(table) else {
                println!("SKIPPED: this machine has no {table}.");
                continue;
            };
            for (name, elements, mut work) in loops(ops) {
                work(); // Whatever is done once only.
                let Some(all) = count(&mut *work) else {
                    continue;
                };
                let found = all.saturating_sub(nothing);
                let known = EXPECTED.iter().find(|(t, n, _)| (*t, *n) == (table, name));
                let expected = known.map_or(0, |(_, _, count)| *count);
                let verdict = match found as f64 > expected as f64 * (1.0 + TOLERANCE) {
                    true => "TOO MANY",
                    false => "ok",
                };
                println!(
                    "{table}: {name}: {found} instructions, {:.3} per element, {expected} expected: {verdict}",
                    found as f64 / elements as f64
                );
                status |= i32::from(judged && verdict != "ok");
            }
        }
        status
    }

    /// Name, elements that are read, what to count.
    type Loop = (&'static str, usize, Box<dyn FnMut()>);

    fn loops(ops: &'static CpuOps) -> Vec<Loop> {
        vec![
            (
                "keys, head_dim 64, 1 query",
                64 * TOKENS,
                keys(ops, 64, 1, 0),
            ),
            (
                "keys, head_dim 64, 3 queries",
                64 * TOKENS,
                keys(ops, 64, 3, 0),
            ),
            (
                "keys, head_dim 64, 3 queries, 12 third bits",
                64 * TOKENS,
                keys(ops, 64, 3, 12),
            ),
            (
                "keys, head_dim 128, 4 queries",
                128 * TOKENS,
                keys(ops, 128, 4, 0),
            ),
            (
                "values, head_dim 64, 3 queries",
                64 * TOKENS,
                values(ops, 64, 3),
            ),
            (
                "values, head_dim 128, 4 queries",
                128 * TOKENS,
                values(ops, 128, 4),
            ),
            (
                "window scores, 32 x 64, 3 queries",
                32 * 64,
                window(ops, true),
            ),
            (
                "window sums, 32 x 64, 3 queries",
                32 * 64,
                window(ops, false),
            ),
            ("exponentials", TOKENS, exponentials(ops)),
            ("quantise, clipped", TOKENS, quantise(ops, Clip::Keys)),
            ("quantise", TOKENS, quantise(ops, Clip::None)),
            ("rotate 64 channels", 64, rotated()),
        ]
    }

    fn keys(ops: &'static CpuOps, dim: usize, n: usize, boosted: u16) -> Box<dyn FnMut()> {
        let codes = vec![0x6Cu8; TOKENS * dim / 4];
        let halves = [0x66u8, 0x2E].repeat(dim); // 0.1
        let boosted: Vec<u8> = (0..boosted).flat_map(|i| (i * 5).to_le_bytes()).collect();
        let (q, mut scores) = (vec![0.5f32; n * dim], vec![0f32; n * TOKENS]);
        Box::new(move || {
            let keys = Keys {
                bits: 2,
                tokens: TOKENS,
                codes: &codes,
                scale: &halves,
                min: &halves,
                boosted: &boosted,
                high: &codes[..boosted.len() / 2 * TOKENS / 8],
            };
            (ops.key_scores)(&keys, &q, dim, &mut scores);
            black_box(&scores);
        })
    }

    fn values(ops: &'static CpuOps, dim: usize, n: usize) -> Box<dyn FnMut()> {
        let codes = vec![0x6Cu8; TOKENS * dim / 4];
        let halves = [0x66u8, 0x2E].repeat(TOKENS);
        let (p, mut out) = (vec![0.5f32; n * TOKENS], vec![0f32; n * dim]);
        Box::new(move || {
            let values = Values {
                bits: 2,
                tokens: TOKENS,
                v_dim: dim,
                codes: &codes,
                scale: &halves,
                min: &halves,
            };
            (ops.value_sum)(&values, &p, &mut out);
            black_box(&out);
        })
    }

    fn window(ops: &'static CpuOps, scores: bool) -> Box<dyn FnMut()> {
        let kv = vec![f16::ONE; 32 * 64];
        let (x, mut out) = (vec![0.5f32; 3 * 64], vec![0f32; 3 * 64]);
        Box::new(move || {
            match scores {
                true => (ops.full_scores)(Full::F16(&kv), &x, 64, &mut out[..3 * 32], 32),
                false => (ops.full_sum)(Full::F16(&kv), &x[..3 * 32], 32, 64, &mut out),
            }
            black_box(&out);
        })
    }

    fn exponentials(ops: &'static CpuOps) -> Box<dyn FnMut()> {
        Box::new(move || {
            let mut x = [-1f32; TOKENS];
            black_box((ops.exp_sum)(black_box(&mut x), 3.0));
        })
    }

    fn quantise(ops: &'static CpuOps, clip: Clip) -> Box<dyn FnMut()> {
        let x: Vec<f32> = (0..TOKENS).map(|i| (i * 37 % 101) as f32 * 0.1).collect();
        Box::new(move || {
            let mut codes = [0u8; TOKENS];
            black_box((ops.quantize_group)(
                &x,
                &[1.0; TOKENS],
                2,
                clip,
                &mut codes,
            ));
        })
    }

    fn rotated() -> Box<dyn FnMut()> {
        Box::new(move || {
            let mut x = [1f32; 64];
            rotate(black_box(&mut x));
            black_box(&x);
        })
    }

    /// Instructions of `work` in a child process, with those of two signals; `None` if it cannot be traced.
    fn count(mut work: impl FnMut()) -> Option<u64> {
        // SAFETY: this process has one thread; the child runs `work`, which takes no lock, and ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: plain system calls on this very process.
            unsafe {
                if libc::ptrace(libc::PTRACE_TRACEME) != 0 {
                    libc::_exit(1);
                }
                libc::raise(libc::SIGSTOP);
                work();
                libc::raise(libc::SIGSTOP);
                libc::_exit(0);
            }
        }
        let mut steps = 0;
        let traced = wait(child)? == libc::SIGSTOP;
        while traced && step(child) {
            steps += 1;
        }
        let mut status = 0;
        // SAFETY: the child is ours; it is ended and reaped.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, &mut status, 0);
        }
        traced.then_some(steps)
    }

    /// One instruction; false at the next stop.
    fn step(child: libc::pid_t) -> bool {
        // SAFETY: the child is ours and stopped.
        let stepped = unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) };
        stepped == 0 && wait(child).is_some_and(|signal| signal != libc::SIGSTOP)
    }

    /// The signal at which a child has stopped.
    fn wait(child: libc::pid_t) -> Option<i32> {
        let mut status = 0;
        // SAFETY: the child is ours, the status is written to an integer.
        let found = unsafe { libc::waitpid(child, &mut status, 0) };
        (found == child && libc::WIFSTOPPED(status)).then(|| libc::WSTOPSIG(status))
    }
}
