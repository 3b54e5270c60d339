//! Attention of prompts on the device: new tokens to stored ones and to each other.

use anyhow::{ensure, Result};
use cudarc::driver::{LaunchConfig, PushKernelArg};

use crate::abi::{Fresh, Prompt, CLEAR_QUERIES};
use crate::device::{address, grid, Attention, DeviceLayer, DevicePlan, THREADS};
use crate::prompt::{clear_shared, sums, tiles, Load, VECTOR};

impl DeviceLayer {
    /// Attention of each row's new tokens, before they are stored, by the fastest kernel that there is. `sums` and `splits`
    /// of the prompt are chosen here.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn prompt(&self, plan: &DevicePlan, prompt: Prompt) -> Result<()> {
        let size = self.dtype.size() as i64;
        let is_even = |x: &Fresh| {
            let strides = [x.row, x.head, x.token].map(|stride| stride * size % VECTOR as i64);
            x.data.is_multiple_of(VECTOR as u64) && strides == [0; 3]
        };
        let all = [prompt.q, prompt.k, prompt.v];
        let kernel = match self.is_tuned_for_prompts() && all.iter().all(is_even) {
            true => Attention::Narrow,
            false => Attention::Clear,
        };
        self.prompt_by(kernel, plan, prompt, None)
    }

    /// The same by this kernel, or by the clear one where no other serves, with contexts cut into so many parts.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn prompt_by(
        &self,
        kernel: Attention,
        plan: &DevicePlan,
        prompt: Prompt,
        splits: Option<usize>,
    ) -> Result<()> {
        let (rows, kv_heads) = (plan.num_rows, self.shape.num_kv_heads);
        let (tokens, ratio) = (prompt.tokens as usize, self.num_heads / kv_heads);
        if rows == 0 || tokens == 0 {
            return Ok(());
        }
        ensure!(
            plan.rows.iter().all(|r| r.fresh <= prompt.tokens),
            "a row has more tokens than its answer"
        );
        let layer = self.abi(plan);
        let Some((function, shared, slots)) = self
            .prompts
            .tuned
            .as_ref()
            .filter(|_| kernel != Attention::Clear)
        else {
            let blocks = (tokens * ratio).div_ceil(CLEAR_QUERIES) as u32;
            let config = LaunchConfig {
                shared_mem_bytes: clear_shared(self.shape.width()),
                ..grid(blocks, kv_heads as u32, rows as u32)
            };
            let mut launch = self.stream.launch_builder(&self.prompts.clear);
            let args = launch.arg(&layer).arg(&plan.words).arg(&plan.tables);
            // SAFETY: the arguments are the kernel's; the caller's tensors have these shapes.
            unsafe { args.arg(&prompt).launch(config) }?;
            return Ok(());
        };
        let load = Load {
            rows: &plan.rows,
            tokens,
            kv_heads,
            ratio,
            slots: *slots,
        };
        let splits = splits.unwrap_or_else(|| load.splits()).max(1);
        let parts = match splits {
            1 => None,
            _ => {
                let len = sums(&load, splits, self.shape.v_dim);
                // SAFETY: the kernel writes what the join reads.
                Some(unsafe { self.stream.alloc::<f32>(len) }?)
            }
        };
        let prompt = Prompt {
            sums: parts.as_ref().map_or(0, |p| address(p, &self.stream)),
            splits: splits as u32,
            ..prompt
        };
        let config = LaunchConfig {
            shared_mem_bytes: *shared,
            ..grid(
                tiles(tokens, ratio) as u32,
                (kv_heads * splits) as u32,
                rows as u32,
            )
        };
        let mut launch = self.stream.launch_builder(function);
        let args = launch.arg(&layer).arg(&plan.words).arg(&plan.tables);
        // SAFETY: as above.
        unsafe { args.arg(&prompt).launch(config) }?;
        if parts.is_some() {
            let threads = tokens * ratio * self.shape.v_dim / 4;
            let blocks = threads.div_ceil(THREADS as usize) as u32;
            let mut launch = self.stream.launch_builder(&self.prompts.join);
            let args = launch.arg(&layer).arg(&plan.words).arg(&prompt);
            // SAFETY: as above.
            unsafe { args.launch(grid(blocks, kv_heads as u32, rows as u32)) }?;
        }
        Ok(())
    }
}
