//! Whether two answers to one request are the same.

use super::Answer;

/// By how much log-probabilities may differ of a request asked alone and beside others, on a backend that stores
/// what it is given. A preempted sequence is computed anew in one prompt: sums of another order, rounded to f16,
/// and to 8 bits before each product of matrices. The same is allowed in `toy::RECOMPUTED` (measured there:
/// 0.03); a wrong block is off by units.
pub const TIE: f32 = 0.1;

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

#[cfg(test)]
mod tests {
    use super::super::ask::Choice;
    use super::*;

    fn answer(tokens: &[(&str, f32)]) -> Answer {
        let choice = Choice {
            text: tokens.iter().map(|t| t.0).collect(),
            tokens: tokens.iter().map(|t| (t.0.to_owned(), t.1)).collect(),
            finish: "length".into(),
        };
        Answer {
            choices: vec![choice],
            tokens: 9,
        }
    }

    #[test]
    fn only_ties_may_part() {
        let one = answer(&[("a", -0.1), ("b", -0.7)]);
        let near = answer(&[("a", -0.12), ("c", -0.72)]);
        let far = answer(&[("a", -0.1), ("b", -1.7)]);
        let short = answer(&[("a", -0.1)]);
        assert!(agree(&one, &one, TIE).is_ok_and(|v| !v.tie));
        assert!(agree(&one, &near, TIE).is_ok_and(|v| v.tie));
        assert!(agree(&one, &far, TIE).is_err());
        assert!(agree(&one, &short, TIE).is_err());
    }
}
