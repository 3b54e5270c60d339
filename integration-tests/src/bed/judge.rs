//! Whether two answers to one request are the same.

use super::Answer;

/// By how much log-probabilities may differ of a request asked alone and beside others. What mistral.rs 0.8.1 calls
/// so of a greedy token is log10 of its logit. A preempted sequence is computed anew in one prompt: sums of another
/// order, rounded to f16, and to 8 bits before each product of matrices (0.03 in `toy::RECOMPUTED`; here 0.000 in
/// 200 answers). Reading what was hit at two bits moves it by 0.08.
pub const TIE: f32 = 0.04;

/// Two answers that agree.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// They part at a tie, and were compared up to it.
    pub tie: bool,
    /// The largest difference of a log-probability.
    pub largest: f32,
}

/// Compare tokens and log-probabilities, up to a tie.
///
/// # Errors
/// If they differ by more; the text says where.
pub fn agree(expected: &Answer, found: &Answer, budget: f32) -> Result<Verdict, String> {
    let (count, choices) = (expected.choices.len(), found.choices.len());
    if count != choices {
        return Err(format!("{choices} choices instead of {count}"));
    }
    let mut verdict = Verdict::default();
    for (a, b) in expected.choices.iter().zip(&found.choices) {
        let mut parted = false;
        for (i, (x, y)) in a.tokens.iter().zip(&b.tokens).enumerate() {
            let difference = (x.1 - y.1).abs();
            if difference.is_nan() || difference > budget {
                return Err(format!("token {i} is {y:?} and was {x:?} alone"));
            }
            verdict.largest = verdict.largest.max(difference);
            if x.0 != y.0 {
                parted = true;
                break;
            }
        }
        verdict.tie |= parted;
        let same = (&a.text, &a.finish, a.tokens.len()) == (&b.text, &b.finish, b.tokens.len());
        if !parted && !same {
            return Err(format!("{b:?} and was {a:?} alone"));
        }
    }
    Ok(verdict)
}
