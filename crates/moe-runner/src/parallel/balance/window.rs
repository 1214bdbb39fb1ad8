//! How busy every expert of every layer was lately.

use crate::comm::{At, Communicator, Step};
use crate::router::{LayerTrace, LogicalId, Routing};
use crate::{Error, Result};

/// Slots (token, choice) that went to each expert of each layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loads {
    experts: usize,
    counts: Vec<u64>,
}

impl Loads {
    /// `counts` `[layers, experts]`.
    ///
    /// # Errors
    /// If they are not rows of `experts`.
    pub fn new(experts: usize, counts: Vec<u64>) -> Result<Self> {
        if experts == 0 || !counts.len().is_multiple_of(experts) {
            let reason = format!("{} counts are not rows of {experts} experts", counts.len());
            return Err(Error::input("expert load", reason));
        }
        Ok(Self { experts, counts })
    }

    /// All that one recorded layer chose, of its first `experts` ids (identity and skip experts,
    /// which come after those with weights, are nobody's work).
    ///
    /// # Errors
    /// If the trace has fewer ids.
    pub fn of_trace(trace: &LayerTrace, experts: usize) -> Result<Self> {
        if trace.choices() < experts {
            return Err(Error::input(
                "routing trace",
                format!(
                    "layer '{}' was recorded with {} experts; it has {experts}",
                    trace.name(),
                    trace.choices()
                ),
            ));
        }
        let mut counts = vec![0; experts];
        count(trace.ids(), &mut counts);
        Self::new(experts, counts)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.counts.len() / self.experts
    }

    /// The experts of one layer.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> &[u64] {
        &self.counts[layer * self.experts..][..self.experts]
    }

    /// Adds what the other ranks of `group` have counted. Ranks that have the same rows count them
    /// all: `group` should hold one of them, or all (which scales every load alike).
    ///
    /// # Errors
    /// A rank that does not arrive, or has other layers or experts.
    pub fn all_reduce(&mut self, group: &dyn Communicator) -> Result<()> {
        group.all_reduce(At::new("expert load", Step::Balance), &mut self.counts)
    }
}

/// Adds one for each id that is an expert.
fn count(ids: impl Iterator<Item = LogicalId>, counts: &mut [u64]) {
    for id in ids {
        if let Some(count) = counts.get_mut(id.index()) {
            *count += 1;
        }
    }
}

/// The loads of the last W forward steps, as a ring. Memory: `(W + 1) · layers · experts` counts.
#[derive(Clone, Debug)]
pub struct LoadWindow {
    experts: usize,
    /// `[steps, layers, experts]`.
    ring: Vec<u32>,
    /// `[layers, experts]`: the sum over the ring.
    sums: Vec<u64>,
    /// The step that is being recorded.
    now: usize,
}

impl LoadWindow {
    /// Empty, for `layers` layers of `experts` experts with weights, over the last `steps` steps.
    ///
    /// # Errors
    /// If one of them is zero, or their product does not fit memory's addresses.
    pub fn new(layers: usize, experts: usize, steps: usize) -> Result<Self> {
        let size = layers.checked_mul(experts);
        match size.and_then(|size| Some((size, size.checked_mul(steps)?))) {
            Some((size, all)) if all > 0 && all <= isize::MAX as usize / 4 => {
                Ok(Self { experts, ring: vec![0; all], sums: vec![0; size], now: 0 })
            }
            _ => Err(Error::input(
                "load window",
                format!("{steps} steps of {layers} layers of {experts} experts"),
            )),
        }
    }

    /// Counts one call of layer number `layer`. Only experts with weights count. Hand in the
    /// routing of real rows: where a batch is padded, route the padding elsewhere.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn record(&mut self, layer: usize, routing: &Routing) -> Result<()> {
        let (size, first) = (self.sums.len(), layer.saturating_mul(self.experts));
        if first >= size {
            let layers = size / self.experts;
            return Err(Error::input("load window", format!("layer {layer} of {layers}")));
        }
        let step = &mut self.ring[self.now * size + first..][..self.experts];
        let sums = &mut self.sums[first..][..self.experts];
        for id in &routing.ids {
            if let Some(count) = step.get_mut(id.index())
                && let Some(more) = count.checked_add(1)
            {
                *count = more;
                sums[id.index()] += 1;
            }
        }
        Ok(())
    }

    /// Ends a step: what follows belongs to the next one, and the oldest step is forgotten.
    pub fn advance(&mut self) {
        let size = self.sums.len();
        self.now = (self.now + 1) % (self.ring.len() / size);
        let oldest = &mut self.ring[self.now * size..][..size];
        for (sum, count) in self.sums.iter_mut().zip(oldest) {
            *sum -= u64::from(std::mem::take(count));
        }
    }

    /// The sums over the window, of this rank.
    pub fn loads(&self) -> Loads {
        Loads { experts: self.experts, counts: self.sums.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing(ids: &[u32]) -> Routing {
        let ids: Vec<LogicalId> = ids.iter().copied().map(LogicalId).collect();
        let weights = vec![1.0; ids.len()];
        Routing::from_parts(2, ids, weights).unwrap()
    }

    #[test]
    fn the_window_holds_its_last_steps_and_real_experts_only() {
        let mut window = LoadWindow::new(2, 3, 2).unwrap();
        // ids from 3 on are identity or skip experts
        window.record(0, &routing(&[0, 1, 2, 3])).unwrap();
        window.record(0, &routing(&[0, 4])).unwrap();
        window.record(1, &routing(&[2, 1])).unwrap();
        assert_eq!(window.loads().layer(0), [2, 1, 1]);
        window.advance();
        window.record(0, &routing(&[1, 0])).unwrap();
        assert_eq!(window.loads().layer(0), [3, 2, 1]);
        assert_eq!(window.loads().layer(1), [0, 1, 1]);
        window.advance();
        assert_eq!(window.loads().layer(0), [1, 1, 0], "the first step is forgotten");
        assert_eq!(window.loads().layer(1), [0, 0, 0]);
        window.advance();
        window.advance();
        assert_eq!(window.loads(), Loads::new(3, vec![0; 6]).unwrap());
        let error = window.record(2, &routing(&[0, 1])).unwrap_err().to_string();
        assert!(error.contains("layer 2 of 2"), "{error}");
        assert!(LoadWindow::new(1, 0, 5).is_err());
        assert!(LoadWindow::new(usize::MAX, 2, 2).is_err());
    }

    /// A step's place in the ring is used again and again: what it held is taken off once.
    #[test]
    fn a_window_holds_its_last_steps_however_long_it_moves() {
        let chosen = |step: u32| [step % 3, step * step % 3];
        let mut window = LoadWindow::new(1, 3, 4).unwrap();
        for step in 0..20 {
            window.record(0, &routing(&chosen(step))).unwrap();
            let mut counts = vec![0; 3];
            let last = (step.saturating_sub(3)..=step).flat_map(chosen);
            last.for_each(|id| counts[id as usize] += 1);
            assert_eq!(window.loads(), Loads::new(3, counts).unwrap(), "step {step}");
            window.advance();
        }
    }

    #[test]
    fn ranks_add_up_their_loads() {
        let loads = crate::comm::run_ranks(3, |comm| {
            let rank = comm.rank() as u64;
            let mut loads = Loads::new(2, vec![rank, 1, 10 * rank, 0])?;
            loads.all_reduce(&**comm)?;
            Ok(loads)
        })
        .unwrap();
        let want = Loads::new(2, vec![3, 3, 30, 0]).unwrap();
        assert!(loads.iter().all(|loads| *loads == want));
    }
}
