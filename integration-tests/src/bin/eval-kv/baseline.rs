//! The logits of a text in full precision, kept in a file: with a vocabulary of 152,000, those of 4,096 tokens are
//! 2.5 GB, so of longer texts every second, fourth, .. position is compared.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor};

/// Most positions that are compared.
const MOST: usize = 4096;

/// The step between positions of a text that are compared.
pub fn stride(tokens: usize) -> usize {
    tokens.div_ceil(MOST).max(1)
}

/// Rows of logits, f32, one after the other.
pub struct Baseline {
    file: Mutex<File>,
    vocabulary: usize,
    stride: usize,
}

/// A baseline that is being written.
pub struct Writer {
    out: BufWriter<File>,
    partial: PathBuf,
    path: PathBuf,
    stride: usize,
    tokens: usize,
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

    /// Open what a [`Writer`] wrote for `len` tokens.
    pub fn open(path: &Path, len: usize) -> Result<Self> {
        let (stride, file) = (stride(len), File::open(path)?);
        let len = len.div_ceil(stride);
        let numbers = file.metadata()?.len() as usize / 4;
        ensure!(
            len > 0 && numbers.is_multiple_of(len),
            "{} is damaged: delete it",
            path.display()
        );
        Ok(Self {
            file: Mutex::new(file),
            vocabulary: numbers / len,
            stride,
        })
    }

    /// Logits after token `i`, a multiple of the stride.
    pub fn row(&self, i: usize) -> Result<Vec<f32>> {
        ensure!(i.is_multiple_of(self.stride), "token {i} is not compared");
        let i = i / self.stride;
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

impl Writer {
    /// A baseline for `len` tokens, at `path` once it is complete.
    pub fn create(path: &Path, len: usize) -> Result<Self> {
        let partial = path.with_extension(format!("partial-{}", std::process::id()));
        Ok(Self {
            out: BufWriter::new(File::create(&partial)?),
            partial,
            path: path.to_owned(),
            stride: stride(len),
            tokens: 0,
        })
    }

    /// Add the logits of the next tokens, `(tokens, vocabulary)`.
    pub fn add(&mut self, logits: &Tensor) -> Result<()> {
        for i in 0..logits.dim(0)? {
            if (self.tokens + i).is_multiple_of(self.stride) {
                for x in row(logits, i)? {
                    self.out.write_all(&x.to_le_bytes())?;
                }
            }
        }
        self.tokens += logits.dim(0)?;
        Ok(())
    }

    pub fn finish(mut self) -> Result<()> {
        self.out.flush()?;
        Ok(std::fs::rename(self.partial, self.path)?)
    }
}

/// One row of a tensor of logits.
pub fn row(logits: &Tensor, i: usize) -> Result<Vec<f32>> {
    Ok(logits.get(i)?.to_dtype(DType::F32)?.to_vec1()?)
}
