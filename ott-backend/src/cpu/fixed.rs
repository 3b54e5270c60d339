//! Factors in fixed point, for tables that add up codes in integers.
//!
//! A row's factor, `x * scale`, becomes a 16-bit fixed-point number whose step is the largest factor
//! of the strip over [`LIMIT`]: two signed bytes. Instructions that multiply bytes add up four rows
//! without rounding. So a sum errs by half a step times its codes' distances from the middle code
//! (what rounding changes in the middle is put back), beside the roundings of f32. Codes themselves
//! are off by up to half of a whole factor.

use super::strip::ROWS;

/// The largest factor in steps; 127 * 256 + 127 fits two signed bytes.
pub const LIMIT: f32 = 32600.0;

/// One query's factors over a strip.
#[derive(Clone, Copy)]
pub struct Fixed {
    /// Factor `r` is `(high[r] * 256 + low[r]) * step`, bytes signed; 0 beyond the strip's rows.
    pub low: [u8; ROWS],
    /// See `low`.
    pub high: [u8; ROWS],
    /// See `low`.
    pub step: f32,
    /// What is the same for all columns.
    pub base: f32,
}

impl Fixed {
    /// Nothing.
    pub const ZERO: Self = Self {
        low: [0; ROWS],
        high: [0; ROWS],
        step: 0.0,
        base: 0.0,
    };
}
