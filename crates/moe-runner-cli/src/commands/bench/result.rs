//! What is measured, as `bench --json` writes it and `--compare` and `report --bench` read it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use moe_runner::comm::Sizes;
use serde::{Deserialize, Serialize};

use crate::gpu::GpuLimits;

/// What `bench --json` writes, and `report --bench` reads.
#[derive(Serialize, Deserialize)]
pub(in crate::commands) struct BenchJson {
    /// The layer, in words.
    #[serde(alias = "layer")]
    pub(in crate::commands) subject: String,
    pub(in crate::commands) kernel: String,
    pub(in crate::commands) format: String,
    pub(in crate::commands) dtype: String,
    pub(in crate::commands) seed: u64,
    /// Bytes of weights that differ from each other; other experts share them.
    pub(in crate::commands) distinct_bytes: usize,
    /// Whether so few may stay in the last-level cache, so that rows measure that and not memory.
    pub(in crate::commands) cached: bool,
    /// The ranks, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) split: Option<Sizes>,
    pub(in crate::commands) limits: LimitsJson,
    /// From loaded weights to a layer that can run: the packing, or the mapping of what was packed.
    #[serde(default)]
    pub(in crate::commands) ready_s: f64,
    pub(in crate::commands) rows: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
pub(in crate::commands) struct LimitsJson {
    pub(in crate::commands) read_gbps: f64,
    /// By arithmetic.
    pub(in crate::commands) gflops: BTreeMap<String, f64>,
    pub(in crate::commands) threads: usize,
    pub(in crate::commands) isa: String,
    /// Of a GPU, where the kernel runs on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) gpu: Option<GpuLimits>,
}

#[derive(Default, Serialize, Deserialize)]
pub(in crate::commands) struct Row {
    pub(in crate::commands) tokens: usize,
    pub(in crate::commands) median_s: f64,
    pub(in crate::commands) min_s: f64,
    /// Between which half of the runs are.
    pub(in crate::commands) quartiles_s: [f64; 2],
    pub(in crate::commands) max_s: f64,
    pub(in crate::commands) runs: usize,
    pub(in crate::commands) tokens_per_s: f64,
    /// The mean of all runs: which experts are active differs from run to run.
    pub(in crate::commands) bytes_weights_read: f64,
    pub(in crate::commands) flops: f64,
    pub(in crate::commands) gbps: f64,
    pub(in crate::commands) gflops: f64,
    pub(in crate::commands) limit_share: f64,
    pub(in crate::commands) bound_by: String,
    /// The least time for the bytes, and for the arithmetic.
    #[serde(default)]
    pub(in crate::commands) limits_s: [f64; 2],
    /// Payload that ranks sent to other ranks, over all ranks, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) bytes_moved_per_token: Option<f64>,
    /// Where rows go from GPU to GPU: the exchange alone, on the slowest rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) exchange: Option<ExchangeJson>,
}

/// Dispatch and combine without the experts.
#[derive(Clone, Serialize, Deserialize)]
pub(in crate::commands) struct ExchangeJson {
    pub(in crate::commands) seconds: f64,
    /// The same bytes to and from the same ranks, and nothing else.
    pub(in crate::commands) bare_seconds: f64,
    /// Bytes that the busiest rank sent, both ways.
    pub(in crate::commands) sent: u64,
}

impl BenchJson {
    /// What an earlier run wrote.
    pub(in crate::commands) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
        let json: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{}: is not what `bench --json` writes", path.display()))?;
        let numbers =
            json.rows.iter().flat_map(|row| [row.bytes_weights_read, row.flops, row.gflops]);
        let limits = json.limits.gflops.values().chain([&json.limits.read_gbps]);
        if let Some(bad) = numbers.chain(limits.copied()).find(|v| !(v.is_finite() && *v > 0.0)) {
            bail!("{}: {bad} is no rate or amount that a run has", path.display());
        }
        Ok(json)
    }
}
