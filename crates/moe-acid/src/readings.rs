//! From an engine's log-probabilities to the numbers that its block wrote.

use serde::{Deserialize, Serialize};

use crate::probes::RULER;
use crate::{Block, Family};

/// What a block wrote to each coordinate that is read, `[probes][reads]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Readings(pub Vec<Vec<f64>>);

impl Readings {
    /// From logits or log-probabilities `[probes][vocabulary]`, whatever constants the softmax and
    /// the last norm put there: `h[j] = ruler/2 · (l[j] − l[zero]) / (l[ruler] − l[zero]) / 4`.
    ///
    /// # Errors
    /// If there are too few rows or too few tokens in a row.
    pub fn from_log_probabilities(block: &Block, rows: &[Vec<f64>]) -> Result<Self, String> {
        let (probes, vocabulary) = (block.probes.len(), block.vocabulary());
        if rows.len() < probes {
            return Err(format!("{} rows of log-probabilities for {probes} probes", rows.len()));
        }
        if let Some((row, values)) = rows.iter().enumerate().find(|(_, r)| r.len() < vocabulary) {
            let found = values.len();
            return Err(format!("row {row} has {found} log-probabilities, not {vocabulary}"));
        }
        let read = |row: &Vec<f64>| {
            let (zero, ruler) = (row[probes], row[probes + 1]);
            let scale = RULER / 2.0 / (ruler - zero) / 4.0;
            row[probes + 2..vocabulary].iter().map(|l| (l - zero) * scale).collect()
        };
        Ok(Self(rows[..probes].iter().map(read).collect()))
    }

    /// From a block's output `[probes, H]`: where it can be had without the rest of a model.
    ///
    /// # Errors
    /// If it has another length.
    pub fn from_output(block: &Block, output: &[f32]) -> Result<Self, String> {
        let (probes, hidden) = (block.probes.len(), block.family.hidden);
        if output.len() != probes * hidden {
            return Err(format!("{} values, not [{probes}, {hidden}]", output.len()));
        }
        let rows = output.chunks_exact(hidden).map(|row| &row[block.read_coordinates()]);
        Ok(Self(rows.map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect()))
    }
}

/// What `acid read` takes: numbers from anywhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReadingsFile {
    /// The checkpoint's name.
    pub family: String,
    /// Which engine said it, for people: name, version, device, dtype.
    #[serde(default)]
    pub engine: String,
    /// `[probes][vocabulary]`: logits or log-probabilities at each probe's position. A number that
    /// an engine gives as null, NaN or infinity stands as null.
    pub log_probabilities: Vec<Vec<Option<f64>>>,
}

impl ReadingsFile {
    /// The block that was asked, and what it wrote.
    ///
    /// # Errors
    /// If there is no such family, or too few numbers.
    pub fn read(&self) -> Result<(Block, Readings), String> {
        let family = Family::named(&self.family).ok_or_else(|| {
            let known: Vec<&str> = crate::FAMILIES.iter().map(|family| family.name).collect();
            format!("no checkpoint '{}'; there are {}", self.family, known.join(", "))
        })?;
        let rows: Vec<Vec<f64>> = self
            .log_probabilities
            .iter()
            .map(|row| row.iter().map(|v| v.unwrap_or(f64::NAN)).collect())
            .collect();
        let block = Block::new(family);
        let readings = Readings::from_log_probabilities(&block, &rows)?;
        Ok((block, readings))
    }
}
