//! No tables beside the specification.

use super::CpuOps;

/// None.
pub fn tables() -> impl Iterator<Item = &'static CpuOps> {
    std::iter::empty()
}
