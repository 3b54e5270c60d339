//! Tables of aarch64.

use super::{neon, CpuOps};

/// Those that this machine can run, the fastest last.
pub fn tables() -> impl Iterator<Item = &'static CpuOps> {
    neon::table().into_iter()
}
