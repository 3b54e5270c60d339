//! What a host may do, in any order.

use proptest::prelude::*;

use super::LAYERS;
use crate::harness::Text;
use crate::reference::Rules;

/// Options of a cache, and what they mean.
pub type Setting<'a> = (&'a str, Rules);

const RULES: Rules = Rules {
    group: 32,
    residual: 32,
    outliers: 2,
    extra: 3,
    ..Rules::PAPER
};

/// A window of at least a group.
pub const PLAIN: Setting<'_> = ("paper,group=32,residual=32,outliers=2,extra=3", RULES);

/// A group is sealed as soon as it is full.
pub const NO_WINDOW: Setting<'_> = (
    "paper,group=32,residual=0,outliers=2,extra=3",
    Rules {
        residual: 0,
        ..RULES
    },
);

/// As by default: some key channels with a third bit, values in another basis.
pub const BOOSTED: Setting<'_> = (
    "paper,group=32,residual=32,outliers=2,extra=3,boost=12,rotate=v",
    Rules {
        boost: 12,
        rotate: true,
        ..RULES
    },
);

/// Blocks of several chunks.
pub const LARGER: Setting<'_> = (
    "paper,group=64,residual=32,outliers=2,extra=3",
    Rules { group: 64, ..RULES },
);

#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// A prompt arrives; what is stored of it is hit.
    Start {
        text: usize,
        tokens: usize,
        pick: usize,
    },
    /// All whose prompts are not done compute so many tokens of them at most, in one step.
    Prompt {
        tokens: usize,
    },
    /// All others compute so many tokens in one step, and lose some of them again.
    Decode {
        tokens: usize,
        rejected: usize,
    },
    /// A step that breaks off after one layer.
    Fail {
        layer: usize,
        prompt: bool,
    },
    /// A step in which one row's keys of one layer are not finite.
    Bad {
        layer: usize,
        who: usize,
        prompt: bool,
    },
    /// A sequence's blocks are taken away.
    Preempt {
        who: usize,
    },
    /// What was preempted, or found no room, is computed anew.
    Resume {
        pick: usize,
    },
    End {
        who: usize,
    },
    Reset,
}

impl Op {
    /// As a GPU can do it, which decodes one token of a sequence in a step.
    #[allow(dead_code)]
    pub fn of_one_token(self) -> Self {
        match self {
            Self::Decode { .. } => Self::Decode {
                tokens: 1,
                rejected: 0,
            },
            op => op,
        }
    }
}

pub fn op() -> impl Strategy<Value = Op> {
    let tokens = prop_oneof![2 => 1usize..170, 1 => (1usize..5).prop_map(|i| 32 * i + 1)];
    let start = (0usize..6, tokens, 0usize..4);
    let prompt = prop_oneof![1usize..8, 20usize..170];
    let decode = prop_oneof![4 => Just((1, 0)), 2 => (1usize..70, 0usize..33)];
    prop_oneof![
        5 => start.prop_map(|(text, tokens, pick)| Op::Start { text, tokens, pick }),
        6 => prompt.prop_map(|tokens| Op::Prompt { tokens }),
        9 => decode.prop_map(|(tokens, rejected)| Op::Decode { tokens, rejected }),
        1 => (0..LAYERS, any::<bool>()).prop_map(|(layer, prompt)| Op::Fail { layer, prompt }),
        1 => (0..LAYERS, 0usize..8, any::<bool>()).prop_map(|(layer, who, prompt)| Op::Bad { layer, who, prompt }),
        2 => (0usize..8).prop_map(|who| Op::Preempt { who }),
        3 => (0usize..4).prop_map(|pick| Op::Resume { pick }),
        3 => (0usize..8).prop_map(|who| Op::End { who }),
        1 => Just(Op::Reset),
    ]
}

/// Texts with common beginnings: whole blocks, part of one, nothing.
pub fn texts(seed: u64) -> Vec<Text> {
    let planted = [0, 17, 41, 70, 99, 130, 131, 180, 222];
    let shrinks = [0.02, 0.3, 0.01, 0.005, 0.1, 0.002, 0.2, 0.001, 0.0005];
    let outliers: Vec<_> = planted.into_iter().zip(shrinks).collect();
    let text = Text::with_outliers(seed, &outliers);
    let forks = [(32, 1), (64, 2), (75, 3), (128, 4)];
    let mut texts: Vec<Text> = forks.map(|(at, i)| text.forked(at, seed + i)).into();
    texts.push(Text::with_outliers(seed + 9, &outliers));
    texts.push(text);
    texts
}

/// Histories that once went wrong on a GPU, for groups and windows of 32 tokens.
pub fn once_wrong() -> Vec<(&'static str, Vec<Op>)> {
    let start = |text, tokens| Op::Start {
        text,
        tokens,
        pick: 0,
    };
    let prompt = Op::Prompt { tokens: 170 };
    let decode = |count: usize| {
        let one = Op::Decode {
            tokens: 1,
            rejected: 0,
        };
        vec![one; count]
    };
    // Text 0 leaves the last text after its first block.
    let shared =
        |first: usize, second: usize| vec![start(5, first), prompt, start(0, second), prompt];
    vec![
        (
            "two share a block, and one leaves it before the other",
            [shared(45, 39), decode(40)].concat(),
        ),
        (
            "a third sequence needs a chunk in the step in which one of two seals what both share",
            [vec![start(4, 49), prompt], shared(45, 39), decode(40)].concat(),
        ),
        (
            "two that share a block seal it in one step",
            [shared(50, 50), decode(40)].concat(),
        ),
        (
            "a step breaks off that would have sealed a block of another sequence",
            [
                vec![start(5, 45), prompt, start(0, 100)],
                vec![Op::Fail {
                    layer: 0,
                    prompt: true,
                }],
                decode(40),
            ]
            .concat(),
        ),
        (
            "a row is bad in the step that seals what it shares",
            [
                shared(63, 39),
                vec![Op::Bad {
                    layer: 1,
                    who: 0,
                    prompt: false,
                }],
                decode(20),
                vec![start(5, 63), prompt],
            ]
            .concat(),
        ),
        (
            "a reader ends while the writer has the block in its window",
            [shared(45, 34), vec![Op::End { who: 1 }], decode(20)].concat(),
        ),
    ]
}
