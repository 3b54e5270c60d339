//! What is kept, at how many bits: parsed from the text after `ott:` and valid ever after.

mod hint;

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Which ranges are searched for the least squared error instead of taken from min to max.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clip {
    /// Ranges reach from the group's min to its max (the paper).
    None = 0,
    /// Keys only: the largest gain in quality that costs no bytes.
    Keys = 1,
    /// Keys and values, and what is read back is stretched to the spread that was stored: the nearest
    /// codes lie closer together than the numbers did, which flattens attention and shrinks its answer.
    Both = 2,
}

/// What is rotated before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rotation {
    /// Nothing (the paper).
    None,
    /// Values, by a Hadamard matrix, so that no channel stretches a token's range; see
    /// [`rotate`](crate::rotate).
    Values,
}

/// What an error of a key counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weigh {
    /// The same in all channels (the paper).
    None = 0,
    /// What the sequence's own queries make of it: see [`weigh`](crate::weigh).
    Queries = 1,
}

/// Settings of the cache. [`OttConfig::parse`] makes valid ones; after setting fields by hand, ask
/// [`OttConfig::validate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OttConfig {
    /// Bits per key code: 2, 3, 4 or 8.
    pub k_bits: u8,
    /// Bits per value code: 2, 3, 4 or 8.
    pub v_bits: u8,
    /// G: tokens that are sealed together, and tokens of a block: 32, 64 or 128.
    pub group_size: usize,
    /// R: tokens at least that stay in full precision; a multiple of 32, at most G.
    pub residual: usize,
    /// N: members of the outlier pool, 0 to 16; 0 traces nothing.
    pub outliers: usize,
    /// Tokens that may leave the pool before tracing stops, 0 to 254.
    pub extra: usize,
    /// First layers that do not trace.
    pub exempt_layers: usize,
    /// Range search.
    pub clip: Clip,
    /// Basis of stored values.
    pub rotation: Rotation,
    /// Weights of the keys' errors.
    pub weigh: Weigh,
    /// Of every 64 key channels, how many get one more bit, 0 to 32: in each page those that `k_bits`
    /// serve worst (Kitty, arXiv 2511.18643). Not with 8-bit keys.
    pub boost: usize,
}

impl Default for OttConfig {
    /// What measures best at 2.5 page bits at most (docs/quality.md): the paper with clipped ranges,
    /// rotated values, a third bit for three sixteenths of the key channels, and codes of keys chosen for
    /// the queries that read them.
    fn default() -> Self {
        Self::two_bits()
    }
}

impl OttConfig {
    /// What may come first in [`OttConfig::parse`]: none for the default, or a name.
    pub const PRESETS: [&'static str; 5] = ["", "3bit", "4bit", "paper", "kivi"];

    const fn two_bits() -> Self {
        Self {
            clip: Clip::Both,
            rotation: Rotation::Values,
            weigh: Weigh::Queries,
            boost: 12,
            ..Self::paper()
        }
    }

    /// The paper to the letter (arXiv 2505.10938, section 4): G 128, R 32, N 3, extra 32, 2 bits.
    pub const fn paper() -> Self {
        Self {
            k_bits: 2,
            v_bits: 2,
            group_size: 128,
            residual: 32,
            outliers: 3,
            extra: 32,
            exempt_layers: 2,
            clip: Clip::None,
            rotation: Rotation::None,
            weigh: Weigh::None,
            boost: 0,
        }
    }

    /// KIVI (arXiv 2402.02750) in our code: no tracing, a window of 128 tokens.
    pub const fn kivi() -> Self {
        Self {
            residual: 128,
            outliers: 0,
            extra: 0,
            exempt_layers: 0,
            ..Self::paper()
        }
    }

    /// About 3 bits of a number: 3-bit keys, a fourth bit for three sixteenths of their channels, and
    /// a window of 64 tokens.
    pub const fn three_bits() -> Self {
        Self {
            k_bits: 3,
            residual: 64,
            ..Self::two_bits()
        }
    }

    /// About 4.5 bits of a number, closer to full precision than fp8 is.
    pub const fn four_bits() -> Self {
        Self {
            k_bits: 4,
            v_bits: 4,
            ..Self::two_bits()
        }
    }

    /// Read `[preset][,name=value]...`; the empty text is [`OttConfig::default`]. A preset's `boost`
    /// goes with its bits of keys: other bits begin without.
    ///
    /// # Errors
    /// If an option is unknown, given twice, out of range or contradicts another one; the message
    /// lists the valid ones.
    pub fn parse(options: &str) -> Result<Self> {
        let mut config = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        let mut boosted_bits = config.k_bits;
        if options.trim().is_empty() {
            return Ok(config);
        }
        for (i, item) in options.split(',').map(str::trim).enumerate() {
            let Some((name, value)) = item.split_once('=') else {
                config = Self::preset(item, i)?;
                boosted_bits = config.k_bits;
                continue;
            };
            let (name, value) = (name.trim(), value.trim());
            if seen.contains(&name) {
                return Err(Error::DuplicateOption {
                    option: name.into(),
                });
            }
            config.set(name, value)?;
            seen.push(name);
        }
        let given = |name| seen.contains(&name);
        if given("bits") && (given("k_bits") || given("v_bits")) {
            return Err(Error::Contradiction {
                why: "`bits` sets both k_bits and v_bits: give it alone, or give those two",
            });
        }
        if config.k_bits == 8 && given("boost") && config.boost > 0 {
            return Err(Error::Contradiction {
                why: "`boost` gives keys one more bit, and there is no ninth: leave it out, or \
                      set k_bits to 2, 3 or 4",
            });
        }
        if config.k_bits != boosted_bits && !given("boost") {
            config.boost = 0;
        }
        if config.outliers == 0 {
            if given("extra") || given("exempt_layers") {
                return Err(Error::Contradiction {
                    why: "without outliers nothing is traced: leave extra and exempt_layers out, \
                          or set outliers to 1 or more",
                });
            }
            (config.extra, config.exempt_layers) = (0, 0);
        }
        config.validate()?;
        Ok(config)
    }

    /// Check the ranges of all fields.
    ///
    /// # Errors
    /// Naming the field, its value and the values it takes.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, option: &str, value: usize, takes| match ok {
            true => Ok(()),
            false => Err(Error::BadValue {
                option: option.into(),
                value: value.to_string().into(),
                takes,
            }),
        };
        check(is_bits(self.k_bits), "k_bits", self.k_bits.into(), BITS)?;
        check(is_bits(self.v_bits), "v_bits", self.v_bits.into(), BITS)?;
        let group = matches!(self.group_size, 32 | 64 | 128);
        check(group, "group", self.group_size, "32, 64 or 128")?;
        let residual = self.residual.is_multiple_of(32);
        check(residual, "residual", self.residual, "a multiple of 32")?;
        check(self.outliers <= 16, "outliers", self.outliers, "0 to 16")?;
        check(self.extra <= 254, "extra", self.extra, "0 to 254")?;
        let most = if self.k_bits == 8 { 0 } else { 32 };
        check(self.boost <= most, "boost", self.boost, BOOST)?;
        if self.residual > self.group_size {
            return Err(Error::ResidualTooLong {
                residual: self.residual,
                group: self.group_size,
            });
        }
        Ok(())
    }

    /// Refuse an exemption that leaves none of a model's layers to trace. The paper's own is taken by any
    /// model, also by one that has no more layers than that.
    ///
    /// # Errors
    /// Naming the option and the model's layers.
    pub fn check_layers(&self, layers: usize) -> Result<()> {
        let asked = self.exempt_layers;
        match self.outliers > 0 && asked >= layers && asked > Self::paper().exempt_layers {
            true => Err(Error::NothingTraced {
                exempt: asked,
                layers,
            }),
            false => Ok(()),
        }
    }

    /// Members of the outlier pool in `layer`.
    pub fn outliers_in(&self, layer: usize) -> usize {
        match layer < self.exempt_layers {
            true => 0,
            false => self.outliers,
        }
    }

    /// Key channels of a head of `k_dim` that get one more bit.
    pub fn boosted(&self, k_dim: usize) -> usize {
        self.boost * k_dim / 64
    }

    fn preset(name: &str, position: usize) -> Result<Self> {
        let preset = match name {
            "paper" => Self::paper(),
            "kivi" => Self::kivi(),
            "3bit" => Self::three_bits(),
            "4bit" => Self::four_bits(),
            _ => {
                return Err(Error::UnknownOption {
                    option: name.into(),
                    hint: hint::of_preset(name),
                })
            }
        };
        if position > 0 {
            return Err(Error::MisplacedPreset {
                preset: name.into(),
            });
        }
        Ok(preset)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "bits" => {
                self.k_bits = number(name, value, BITS)?;
                if !is_bits(self.k_bits) {
                    return Err(bad(name, value, BITS));
                }
                self.v_bits = self.k_bits;
            }
            "k_bits" => self.k_bits = number(name, value, BITS)?,
            "v_bits" => self.v_bits = number(name, value, BITS)?,
            "group" => self.group_size = number(name, value, "32, 64 or 128")?,
            "residual" => self.residual = number(name, value, "a multiple of 32")?,
            "outliers" => self.set_outliers(number(name, value, "0 to 16")?),
            "extra" => self.extra = number(name, value, "0 to 254")?,
            "exempt_layers" => self.exempt_layers = number(name, value, "a number of layers")?,
            "clip" => {
                self.clip = match value {
                    "none" => Clip::None,
                    "k" => Clip::Keys,
                    "kv" => Clip::Both,
                    _ => return Err(bad(name, value, "none, k or kv")),
                }
            }
            "rotate" => {
                self.rotation = match value {
                    "none" => Rotation::None,
                    "v" => Rotation::Values,
                    _ => return Err(bad(name, value, "none or v")),
                }
            }
            "weigh" => {
                self.weigh = match value {
                    "none" => Weigh::None,
                    "q" => Weigh::Queries,
                    _ => return Err(bad(name, value, "none or q")),
                }
            }
            "boost" => self.boost = number(name, value, BOOST)?,
            _ => {
                return Err(Error::UnknownOption {
                    option: name.into(),
                    hint: hint::of_name(name),
                })
            }
        }
        Ok(())
    }

    /// Tracing switched on over a preset without it takes the paper's extra store and exemption.
    fn set_outliers(&mut self, outliers: usize) {
        if self.outliers == 0 {
            self.extra = Self::paper().extra;
            self.exempt_layers = Self::paper().exempt_layers;
        }
        self.outliers = outliers;
    }
}

const BITS: &str = "2, 3, 4 or 8";
const BOOST: &str = "0 to 32, and 0 with k_bits=8";

fn is_bits(bits: u8) -> bool {
    matches!(bits, 2 | 3 | 4 | 8)
}

fn number<T: FromStr>(name: &str, value: &str, takes: &'static str) -> Result<T> {
    value.parse().map_err(|_| bad(name, value, takes))
}

fn bad(name: &str, value: &str, takes: &'static str) -> Error {
    Error::BadValue {
        option: name.into(),
        value: value.into(),
        takes,
    }
}

/// Canonical text: equal settings, equal text, and [`OttConfig::parse`] reads it back.
impl fmt::Display for OttConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "k_bits={},v_bits={},group={},residual={},outliers={}",
            self.k_bits, self.v_bits, self.group_size, self.residual, self.outliers
        )?;
        if self.outliers > 0 {
            write!(
                f,
                ",extra={},exempt_layers={}",
                self.extra, self.exempt_layers
            )?;
        }
        f.write_str(match self.clip {
            Clip::None => ",clip=none",
            Clip::Keys => ",clip=k",
            Clip::Both => ",clip=kv",
        })?;
        f.write_str(match self.rotation {
            Rotation::None => ",rotate=none",
            Rotation::Values => ",rotate=v",
        })?;
        f.write_str(match self.weigh {
            Weigh::None => ",weigh=none",
            Weigh::Queries => ",weigh=q",
        })?;
        match (self.k_bits, self.boost) {
            // What other bits begin with.
            (3.., 0) => Ok(()),
            (_, boost) => write!(f, ",boost={boost}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &str) -> String {
        match OttConfig::parse(options) {
            Ok(config) => config.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn canonical_text_is_read_back() {
        for options in [
            "",
            "paper",
            "kivi",
            "bits=4",
            "k_bits=3",
            "group=32,residual=0",
            "boost=32,rotate=none",
            "paper,boost=1",
            "3bit",
            "4bit",
            "3bit,boost=0",
            "3bit,k_bits=2",
            "k_bits=4,boost=8",
            "paper,weigh=q",
        ] {
            let config = OttConfig::parse(options).expect("valid");
            assert_eq!(
                OttConfig::parse(&config.to_string()),
                Ok(config),
                "{options}"
            );
        }
    }

    #[test]
    fn presets_and_options() {
        let table: Vec<String> = [
            "",
            "paper",
            "kivi",
            "bits=4",
            "k_bits=3, group=64",
            "kivi,outliers=3",
            "3bit",
            "4bit",
            "3bit,k_bits=4",
            "bits=3,boost=8",
        ]
        .iter()
        .map(|options| format!("{options:18} -> {}", parsed(options)))
        .collect();
        insta::assert_snapshot!(table.join("\n"), @r#"
                           -> k_bits=2,v_bits=2,group=128,residual=32,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q,boost=12
        paper              -> k_bits=2,v_bits=2,group=128,residual=32,outliers=3,extra=32,exempt_layers=2,clip=none,rotate=none,weigh=none,boost=0
        kivi               -> k_bits=2,v_bits=2,group=128,residual=128,outliers=0,clip=none,rotate=none,weigh=none,boost=0
        bits=4             -> k_bits=4,v_bits=4,group=128,residual=32,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q
        k_bits=3, group=64 -> k_bits=3,v_bits=2,group=64,residual=32,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q
        kivi,outliers=3    -> k_bits=2,v_bits=2,group=128,residual=128,outliers=3,extra=32,exempt_layers=2,clip=none,rotate=none,weigh=none,boost=0
        3bit               -> k_bits=3,v_bits=2,group=128,residual=64,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q,boost=12
        4bit               -> k_bits=4,v_bits=4,group=128,residual=32,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q,boost=12
        3bit,k_bits=4      -> k_bits=4,v_bits=2,group=128,residual=64,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q
        bits=3,boost=8     -> k_bits=3,v_bits=3,group=128,residual=32,outliers=3,extra=32,exempt_layers=2,clip=kv,rotate=v,weigh=q,boost=8
        "#);
    }

    #[test]
    fn refusals() {
        let valid = format!(" ({})", crate::error::VALID_OPTIONS);
        let table: Vec<String> = [
            "bit=2",
            "best",
            "2bit",
            "8bit",
            "8bits",
            "4",
            "4BIT",
            "Paper",
            "bits",
            "K-bits=4",
            "bits=1",
            "bits=4,paper",
            "group=64,group=32",
            "bits=5",
            "bits=two",
            "group=96",
            "residual=40",
            "group=32,residual=64",
            "kivi,group=64",
            "outliers=17",
            "extra=255",
            "clip=v",
            "rotate=k",
            "weigh=k",
            "boost=33",
            "bits=8,boost=8",
            "bits=2,k_bits=3",
            "kivi,extra=8",
            "paper,",
        ]
        .iter()
        .map(|options| {
            let message = parsed(options);
            let cause = message
                .strip_suffix(&valid)
                .expect("lists the valid options");
            format!("{options:20} -> {cause}")
        })
        .collect();
        insta::assert_snapshot!(table.join("\n"), @r#"
        bit=2                -> the ott cache has no option `bit`
        best                 -> the ott cache has no option `best`
        2bit                 -> the ott cache has no option `2bit`: did you mean `ott`?
        8bit                 -> the ott cache has no option `8bit`: did you mean `ott:bits=8`?
        8bits                -> the ott cache has no option `8bits`: did you mean `ott:bits=8`?
        4                    -> the ott cache has no option `4`: did you mean `ott:4bit`?
        4BIT                 -> the ott cache has no option `4BIT`: did you mean `ott:4bit`?
        Paper                -> the ott cache has no option `Paper`: did you mean `ott:paper`?
        bits                 -> the ott cache has no option `bits`: did you mean `ott:bits=...`?
        K-bits=4             -> the ott cache has no option `K-bits`: did you mean `k_bits`?
        bits=1               -> `bits=1`: bits takes 2, 3, 4 or 8
        bits=4,paper         -> the preset `paper` must come first
        group=64,group=32    -> the option `group` is given twice
        bits=5               -> `bits=5`: bits takes 2, 3, 4 or 8
        bits=two             -> `bits=two`: bits takes 2, 3, 4 or 8
        group=96             -> `group=96`: group takes 32, 64 or 128
        residual=40          -> `residual=40`: residual takes a multiple of 32
        group=32,residual=64 -> a residual window of 64 tokens is longer than a group of 32: lower `residual` or raise `group`
        kivi,group=64        -> a residual window of 128 tokens is longer than a group of 64: lower `residual` or raise `group`
        outliers=17          -> `outliers=17`: outliers takes 0 to 16
        extra=255            -> `extra=255`: extra takes 0 to 254
        clip=v               -> `clip=v`: clip takes none, k or kv
        rotate=k             -> `rotate=k`: rotate takes none or v
        weigh=k              -> `weigh=k`: weigh takes none or q
        boost=33             -> `boost=33`: boost takes 0 to 32, and 0 with k_bits=8
        bits=8,boost=8       -> `boost` gives keys one more bit, and there is no ninth: leave it out, or set k_bits to 2, 3 or 4
        bits=2,k_bits=3      -> `bits` sets both k_bits and v_bits: give it alone, or give those two
        kivi,extra=8         -> without outliers nothing is traced: leave extra and exempt_layers out, or set outliers to 1 or more
        paper,               -> the ott cache has no option ``
        "#);
        insta::assert_snapshot!(valid.trim(), @"(valid: a preset first (paper, kivi, 3bit, 4bit), then any of bits, k_bits, v_bits (2, 3, 4 or 8), group (32, 64 or 128), residual (0, 32, .. up to group), outliers (0 to 16), extra (0 to 254), exempt_layers (0 or more), clip (none, k or kv), rotate (none or v), weigh (none or q), boost (0 to 32, not with 8-bit keys), each once, as name=value, separated by commas)");
    }

    #[test]
    fn an_exemption_leaves_a_layer_to_trace() {
        let check = |options: &str, layers| {
            let config = OttConfig::parse(options).expect("valid");
            config.check_layers(layers).map_err(|e| e.to_string())
        };
        assert_eq!(check("", 30), Ok(()));
        assert_eq!(
            check("", 2),
            Ok(()),
            "the default, for a model of two layers"
        );
        assert_eq!(check("exempt_layers=29", 30), Ok(()));
        assert_eq!(check("kivi", 30), Ok(()));
        let said = check("exempt_layers=999", 30).expect_err("nothing is traced");
        assert!(
            said.starts_with("`exempt_layers=999` leaves none of the model's 30 layers"),
            "{said}"
        );
        assert!(check("exempt_layers=30", 30).is_err());
    }

    #[test]
    fn every_preset_is_read_and_every_name_is_known() {
        for preset in OttConfig::PRESETS {
            assert!(OttConfig::parse(preset).is_ok(), "{preset}");
        }
        for name in hint::NAMES {
            let said = parsed(&format!("{name}=?"));
            assert!(
                said.starts_with(&format!("`{name}=?`: {name} takes ")),
                "{said}"
            );
            assert!(crate::error::VALID_OPTIONS.contains(name), "{name}");
        }
    }
}
