//! The logits of a text in full precision, kept in a file: a vocabulary of 152,000 and 8,192 tokens are 5 GB.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor};

/// Rows of logits, f32, one after the other.
pub struct Baseline {
    file: Mutex<File>,
    vocabulary: usize,
}

impl Baseline {
    /// The file of a model's logits for these tokens, in `folder`.
    pub fn path(folder: &Path, model: &Path, cache: &str, tokens: &[u32]) -> PathBuf {
        let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, t| {
            (hash ^ u64::from(*t)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let model = model.file_stem().unwrap_or_default().to_string_lossy();
        let cache = cache.replace(':', "-");
        folder.join(format!("{model}-{cache}-{}-{hash:016x}.f32", tokens.len()))
    }

    /// Open what [`Baseline::write`] wrote for `len` tokens.
    pub fn open(path: &Path, len: usize) -> Result<Self> {
        let file = File::open(path)?;
        let numbers = file.metadata()?.len() as usize / 4;
        ensure!(
            len > 0 && numbers.is_multiple_of(len),
            "{} is damaged: delete it",
            path.display()
        );
        Ok(Self {
            file: Mutex::new(file),
            vocabulary: numbers / len,
        })
    }

    /// Write logits `(tokens, vocabulary)`.
    pub fn write(path: &Path, logits: &Tensor) -> Result<()> {
        let partial = path.with_extension(format!("partial-{}", std::process::id()));
        let mut out = BufWriter::new(File::create(&partial)?);
        for i in 0..logits.dim(0)? {
            for x in row(logits, i)? {
                out.write_all(&x.to_le_bytes())?;
            }
        }
        out.flush()?;
        Ok(std::fs::rename(partial, path)?)
    }

    /// Logits after token `i`.
    pub fn row(&self, i: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; self.vocabulary * 4];
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start((i * bytes.len()) as u64))?;
            file.read_exact(&mut bytes)?;
        }
        let words = bytes.chunks_exact(4);
        Ok(words
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }
}

/// One row of a tensor of logits.
pub fn row(logits: &Tensor, i: usize) -> Result<Vec<f32>> {
    Ok(logits.get(i)?.to_dtype(DType::F32)?.to_vec1()?)
}
