//! What is kept of queries until their group is sealed: of every 16th token's, their mean over the query heads of a kv
//! head and the roots of their mean squares ([`weigh`](crate::weigh)).

use super::element::{Element, Tokens};
use crate::weigh::SAMPLED;

/// Queries of new tokens.
#[derive(Clone, Copy, Debug)]
pub struct NewQueries<'a, E> {
    /// `(num_heads, tokens, k_dim)`.
    pub tokens: Tokens<'a, E>,
    /// Query heads.
    pub num_heads: usize,
}

/// Samples of a row's new tokens.
#[derive(Debug)]
pub struct NewSamples<E> {
    /// The first one's place in the sequence.
    first: usize,
    heads: usize,
    /// Numbers of a sample: `(2, k_dim)`.
    width: usize,
    /// `(samples, num_kv_heads, 2, k_dim)`.
    numbers: Vec<E>,
}

impl<E: Element> NewSamples<E> {
    /// Of the tokens `past..end` of a sequence, whose keys have `k_dim` channels; zero where there are no queries.
    pub fn new(
        (past, end): (usize, usize),
        queries: Option<&NewQueries<'_, E>>,
        heads: usize,
        k_dim: usize,
    ) -> Self {
        let (first, end) = (past / SAMPLED, end / SAMPLED);
        let width = 2 * k_dim;
        let mut numbers = vec![E::default(); (end - first) * heads * width];
        if let Some(queries) = queries {
            let shared = queries.num_heads / heads;
            for (i, sample) in numbers.chunks_exact_mut(width).enumerate() {
                let (token, head) = ((first + i / heads + 1) * SAMPLED - 1, i % heads);
                let of_head = |q| queries.tokens.row(head * shared + q, token - past);
                summarize((0..shared).map(of_head), sample);
            }
        }
        Self {
            first,
            heads,
            width,
            numbers,
        }
    }

    /// The sample at this place of the sequence; `None` if it is older than this step.
    pub fn get(&self, place: usize, head: usize) -> Option<&[E]> {
        let at = (place.checked_sub(self.first)? * self.heads + head) * self.width;
        self.numbers.get(at..at + self.width)
    }

    /// Places in the sequence.
    pub fn places(&self) -> std::ops::Range<usize> {
        let count = self.numbers.len() / (self.heads * self.width);
        self.first..self.first + count
    }
}

/// Mean and root of the mean square of each channel, over the queries of one token.
fn summarize<'a, E: Element>(queries: impl ExactSizeIterator<Item = &'a [E]>, sample: &mut [E]) {
    let count = queries.len() as f32;
    let k_dim = sample.len() / 2;
    let mut wide = vec![0f32; k_dim];
    let mut sums = vec![0f32; 2 * k_dim];
    let (mean, square) = sums.split_at_mut(k_dim);
    for query in queries {
        E::widen(query, &mut wide);
        for c in 0..k_dim {
            mean[c] += wide[c];
            square[c] += wide[c] * wide[c];
        }
    }
    for c in 0..k_dim {
        mean[c] /= count;
        square[c] = (square[c] / count).sqrt();
    }
    E::narrow(&sums, sample);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_sixteen_tokens_the_last_is_sampled() {
        // Two query heads share each of two kv heads; numbers tell head and token.
        let (num_heads, tokens) = (4, 40);
        let q: Vec<f32> = (0..num_heads * tokens)
            .flat_map(|i| [(i / tokens) as f32, (i % tokens) as f32])
            .collect();
        let queries = NewQueries {
            tokens: Tokens::contiguous(&q, tokens, 2),
            num_heads,
        };
        let samples = NewSamples::new((20, 20 + tokens), Some(&queries), 2, 2);
        // Tokens 31 and 47 of the sequence are new tokens 11 and 27; 63 is not there yet.
        assert_eq!(samples.places(), 1..3);
        let rms = |a: f32, b: f32| ((a * a + b * b) / 2.0).sqrt();
        assert_eq!(
            samples.get(1, 0),
            Some(&[0.5, 11.0, rms(0.0, 1.0), 11.0][..])
        );
        assert_eq!(
            samples.get(2, 1),
            Some(&[2.5, 27.0, rms(2.0, 3.0), 27.0][..])
        );
        assert_eq!((samples.get(0, 0), samples.get(3, 0)), (None, None));
        let none = NewSamples::<f32>::new((20, 20 + tokens), None, 2, 2);
        assert_eq!(none.get(2, 1), Some(&[0.0; 4][..]));
    }
}
