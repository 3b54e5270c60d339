//! Tables of x86-64.

use super::{avx2, avx512, CpuOps};

/// Those that this machine can run, the fastest last.
pub fn tables() -> impl Iterator<Item = &'static CpuOps> {
    [avx2::table(), avx512::table()].into_iter().flatten()
}
