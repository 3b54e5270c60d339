//! What can go wrong, each as a sentence with its numbers and the way out.

use std::fmt;

use ott_kernels::blocks::Refused;

/// Options that [`OttConfig::parse`](crate::OttConfig::parse) knows, for messages.
pub(crate) const VALID_OPTIONS: &str = "valid: a preset first (paper, kivi, 3bit, 4bit), then any of bits, \
     k_bits, v_bits (2, 3, 4 or 8), group (32, 64 or 128), residual (0, 32, .. up to group), \
     outliers (0 to 16), extra (0 to 254), exempt_layers (0 or more), clip (none, k or kv), rotate (none or v), \
     weigh (none or q), boost (0 to 32, not with 8-bit keys), each once, \
     as name=value, separated by commas";

/// Everything this crate refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An option nobody knows.
    UnknownOption {
        /// As typed.
        option: Box<str>,
        /// A clause that tells what was meant, if anything is near.
        hint: Box<str>,
    },
    /// An exemption that leaves no layer to trace.
    NothingTraced {
        /// First layers that do not trace.
        exempt: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A preset that is not the first item.
    MisplacedPreset {
        /// As typed.
        preset: Box<str>,
    },
    /// An option given twice.
    DuplicateOption {
        /// Its name.
        option: Box<str>,
    },
    /// A value outside the option's range, or no number.
    BadValue {
        /// The option's name.
        option: Box<str>,
        /// As typed.
        value: Box<str>,
        /// The values it takes.
        takes: &'static str,
    },
    /// Two options that say different things of one setting, or one that has no effect.
    Contradiction {
        /// Clause that says which and why.
        why: &'static str,
    },
    /// A residual window longer than a group.
    ResidualTooLong {
        /// Tokens asked for.
        residual: usize,
        /// Tokens of a group.
        group: usize,
    },
    /// A block size of the host that is not the group size.
    BlockSize {
        /// Tokens per block asked for.
        asked: usize,
        /// Tokens of a group.
        group: usize,
    },
    /// A head size that the page layout cannot hold.
    HeadDim {
        /// Layer.
        layer: usize,
        /// `"key"` or `"value"`.
        what: &'static str,
        /// Channels.
        dim: usize,
    },
    /// Query heads that are no multiple of the key/value heads.
    Heads {
        /// Layer.
        layer: usize,
        /// Query heads.
        num_heads: usize,
        /// Key/value heads.
        num_kv_heads: usize,
    },
    /// A key or value that is not finite, or beyond what f16 can hold.
    NotRepresentable {
        /// Layer.
        layer: usize,
        /// `"key"` or `"value"`.
        what: &'static str,
        /// Key/value head.
        head: usize,
    },
    /// A step that the cache cannot take.
    Step(Refused),
    /// A plan whose block size is not the cache's.
    PlanBlockSize {
        /// Tokens per block in the plan.
        plan: usize,
        /// Tokens of a group.
        group: usize,
    },
    /// A layer index beyond the model.
    NoSuchLayer {
        /// Asked.
        layer: usize,
        /// Layers held.
        layers: usize,
    },
    /// A row index beyond the plan.
    NoSuchRow {
        /// Asked.
        row: usize,
        /// Rows planned.
        rows: usize,
    },
    /// The same, as a GPU tells it.
    NotRepresentableOnGpu {
        /// Layer.
        layer: usize,
    },
    /// More than one token of a sequence in a step that is no prompt's.
    DecodedTokens {
        /// The host's sequence.
        seq: usize,
        /// Tokens of the step.
        new: usize,
    },
    /// The GPU or its driver failed.
    Cuda {
        /// In the driver's words.
        what: Box<str>,
    },
    /// Layers on several devices.
    Split,
    /// A device that no implementation serves.
    Device {
        /// Its kind.
        kind: &'static str,
    },
    /// Inner loops that this machine cannot run, or that nobody wrote.
    CpuOps {
        /// As asked for.
        name: Box<str>,
        /// Those that it can run.
        available: Vec<&'static str>,
    },
    /// An activation dtype that is not F16, BF16 or F32.
    Dtype {
        /// As candle names it.
        dtype: &'static str,
    },
    /// A tensor whose shape is not the plan's.
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        found: [usize; 4],
        /// Rows, heads, tokens at least, channels.
        expected: [usize; 4],
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownOption { option, hint } => write!(
                f,
                "the ott cache has no option `{option}`{hint} ({VALID_OPTIONS})"
            ),
            Self::NothingTraced { exempt, layers } => write!(
                f,
                "`exempt_layers={exempt}` leaves none of the model's {layers} layers to trace: set it below {layers}, \
                 or switch tracing off with `outliers=0`"
            ),
            Self::MisplacedPreset { preset } => {
                write!(f, "the preset `{preset}` must come first ({VALID_OPTIONS})")
            }
            Self::DuplicateOption { option } => {
                write!(f, "the option `{option}` is given twice ({VALID_OPTIONS})")
            }
            Self::BadValue {
                option,
                value,
                takes,
            } => write!(
                f,
                "`{option}={value}`: {option} takes {takes} ({VALID_OPTIONS})"
            ),
            Self::Contradiction { why } => write!(f, "{why} ({VALID_OPTIONS})"),
            Self::ResidualTooLong { residual, group } => write!(
                f,
                "a residual window of {residual} tokens is longer than a group of {group}: lower \
                 `residual` or raise `group` ({VALID_OPTIONS})"
            ),
            Self::BlockSize { asked, group } => write!(
                f,
                "blocks of {asked} tokens were asked for, but a block of the ott cache is one \
                 group of {group}: leave the block size out, or set `group` to it (32, 64 or 128)"
            ),
            Self::HeadDim { layer, what, dim } => write!(
                f,
                "layer {layer} has {what} heads of {dim} channels; the ott cache packs heads of \
                 8 to 1024 channels, in multiples of 8: run this model without --kv-cache"
            ),
            Self::Heads {
                layer,
                num_heads,
                num_kv_heads,
            } => write!(
                f,
                "layer {layer} has {num_heads} query heads for {num_kv_heads} key/value heads, \
                 which is no whole ratio: run this model without --kv-cache"
            ),
            Self::NotRepresentable { layer, what, head } => write!(
                f,
                "layer {layer}, head {head}: a {what} is infinite, not a number or beyond the \
                 range of f16, so that its group has no scale: this sequence cannot go on"
            ),
            _ => self.fmt_step(f),
        }
    }
}

impl Error {
    /// Errors of a running cache.
    fn fmt_step(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(refused) => write!(f, "{refused}"),
            Self::PlanBlockSize { plan, group } => write!(
                f,
                "a step with blocks of {plan} tokens for a cache with groups of {group}"
            ),
            Self::NoSuchLayer { layer, layers } => {
                write!(f, "layer {layer} asked of a cache of {layers} layers")
            }
            Self::NoSuchRow { row, rows } => {
                write!(f, "row {row} asked of a step of {rows} rows")
            }
            Self::NotRepresentableOnGpu { layer } => write!(
                f,
                "layer {layer}: a key or value is infinite, not a number or beyond the range of f16, so that its group \
                 has no scale: this sequence cannot go on"
            ),
            Self::DecodedTokens { seq, new } => write!(
                f,
                "sequence {seq} decodes {new} tokens in a step; on CUDA the ott cache takes one"
            ),
            Self::Cuda { what } => write!(f, "the ott cache on CUDA: {what}"),
            Self::Split => write!(
                f,
                "the layers of this model lie on several devices; the ott cache runs on one GPU, or on the CPU: load \
                 the whole model on one device, or run with --cpu or without --kv-cache"
            ),
            Self::Device { kind: "CUDA" } => write!(
                f,
                "this build has no CUDA kernels of the ott cache: build with the feature `cuda`, or run with --cpu"
            ),
            Self::Device { kind } => write!(
                f,
                "the ott cache does not run on {kind}. Run with --cpu, or without --kv-cache"
            ),
            Self::CpuOps { name, available } => write!(
                f,
                "OTT_CPU={name}: this machine has no such inner loops. It has {}; without OTT_CPU the \
                 last one is taken",
                available.join(", ")
            ),
            Self::Dtype { dtype } => write!(
                f,
                "the ott cache takes activations in f16, bf16 or f32, not {dtype}"
            ),
            Self::Shape {
                what,
                found,
                expected,
            } => write!(
                f,
                "{what} has shape {found:?}, expected {expected:?} (rows, heads, tokens at least, \
                 channels)"
            ),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        Self::Step(refused)
    }
}

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
