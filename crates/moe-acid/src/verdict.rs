//! Which mistakes explain what was read.

use std::collections::BTreeSet;
use std::fmt;

use crate::block::{SHARED_GATE, UP_SCALE, sigmoid};
use crate::{Block, Mistake, Question, Readings, Shared};

/// Residuals above this are no explanation: readings of 16-bit engines are right to a part in 256.
const NOISE: f64 = 0.01;

/// What a block did.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The mistakes that explain the readings best.
    pub mistakes: Vec<Mistake>,
    /// What the routed part is multiplied by, beyond what it should be: 1 is right.
    pub routed: f64,
    /// The same of the shared part; `None` without one.
    pub shared: Option<f64>,
    /// How far the best explanation is from the readings, relative, as a root mean square.
    pub residual: f64,
    /// Other mistakes, one alone, whose readings this checkpoint cannot tell from these.
    pub same: Vec<Mistake>,
    /// What the engine chose where the model leaves a choice.
    pub notes: Vec<Note>,
    faults: Vec<String>,
}

/// A legitimate freedom that an engine took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Note {
    TiesLowest,
    TiesHighest,
    LogitsRounded,
    BiasRounded,
    RowsRounded,
    Unclear(Question),
}

impl Verdict {
    /// Whether the block computes what the architecture defines.
    pub fn is_right(&self) -> bool {
        self.faults.is_empty()
    }

    /// What is wrong, each in words that a bug report can quote; empty if nothing is.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_right() {
            true => f.write_str("right"),
            false => f.write_str(&self.faults.join("; ")),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TiesLowest => "ties go to the lowest id",
            Self::TiesHighest => "ties go to the highest id",
            Self::LogitsRounded => "router logits rounded to 16 bits",
            Self::BiasRounded => "correction bias rounded to 16 bits",
            Self::RowsRounded => "rows rounded to 8 bits in blocks of 32",
            Self::Unclear(Question::Logits) => "near-equal logits: unclear",
            Self::Unclear(Question::Bias) => "near-equal biases: unclear",
            Self::Unclear(Question::Tie) => "ties: unclear",
        })
    }
}

/// The readings of all single mistakes and pairs, computed once for a block.
#[derive(Debug)]
pub struct Decoder<'a> {
    block: &'a Block,
    /// Every mistake that the checkpoint can show.
    mistakes: Vec<Mistake>,
    book: Vec<Page>,
    /// Probes that are fitted.
    fitted: Vec<usize>,
}

#[derive(Debug)]
struct Page {
    mistakes: BTreeSet<Mistake>,
    routed: Vec<Vec<f64>>,
    shared: Vec<Vec<f64>>,
}

/// How well a page explains readings.
#[derive(Clone, Debug)]
struct Fit {
    mistakes: BTreeSet<Mistake>,
    routed: f64,
    shared: Option<f64>,
    residual: f64,
    cost: f64,
}

impl<'a> Decoder<'a> {
    /// The book of `block`.
    pub fn new(block: &'a Block) -> Self {
        let mistakes = Mistake::of(block.family);
        let singles = mistakes.iter().map(|a| BTreeSet::from([*a]));
        // experts in any order go with too much to be one of several
        let several: Vec<Mistake> =
            mistakes.iter().copied().filter(|one| *one != Mistake::ExpertsPermuted).collect();
        let pairs = several
            .iter()
            .enumerate()
            .flat_map(|(i, a)| several[i + 1..].iter().map(|b| BTreeSet::from([*a, *b])));
        // one at a time where rows are rounded, too
        let rounded =
            std::iter::once(BTreeSet::new()).chain(singles.clone()).map(|mut mistakes| {
                mistakes.insert(Mistake::RowsInEightBits);
                mistakes
            });
        let book = std::iter::once(BTreeSet::new())
            .chain(singles.clone())
            .chain(pairs)
            .chain(rounded)
            .map(|mistakes| page(block, mistakes))
            .collect();
        let fitted = (0..block.probes.len()).filter(|probe| !block.probes.asks(*probe)).collect();
        Self { block, mistakes, book, fitted }
    }

    /// Which mistakes explain `readings`.
    pub fn verdict(&self, readings: &Readings) -> Verdict {
        let mut fits: Vec<Fit> =
            self.book.iter().filter_map(|page| self.fit(page, readings)).collect();
        fits.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        // three at once: the best pairs, and one more
        let triples: BTreeSet<BTreeSet<Mistake>> = fits
            .iter()
            .take(6)
            .filter(|fit| fit.mistakes.len() == 2)
            .flat_map(|fit| {
                self.mistakes.iter().filter(|one| **one != Mistake::ExpertsPermuted).map(|one| {
                    let mut three = fit.mistakes.clone();
                    three.insert(*one);
                    three
                })
            })
            .filter(|three| three.len() == 3)
            .collect();
        let triples = triples.into_iter().map(|mistakes| page(self.block, mistakes));
        fits.extend(triples.filter_map(|page| self.fit(&page, readings)));
        let best = fits.into_iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
        // who was chosen is not to be seen where weights are not at their experts
        let moved = [Mistake::ExpertsShifted, Mistake::ExpertsPermuted, Mistake::WeightsReversed];
        let mut notes = match &best {
            Some(best) if moved.iter().any(|one| best.mistakes.contains(one)) => Vec::new(),
            Some(best) => self.notes(readings, &best.mistakes),
            None => self.notes(readings, &BTreeSet::new()),
        };
        let rounded = |best: &Fit| best.mistakes.contains(&Mistake::RowsInEightBits);
        notes.extend(best.as_ref().is_some_and(rounded).then_some(Note::RowsRounded));
        let Some(mut best) = best else {
            let fault = "not finite in a way that no known mistake explains";
            return Verdict {
                mistakes: Vec::new(),
                routed: f64::NAN,
                shared: None,
                residual: f64::NAN,
                same: Vec::new(),
                notes,
                faults: vec![fault.into()],
            };
        };
        best.mistakes.retain(|mistake| !mistake.is_freedom());
        Verdict {
            faults: self.faults(&best),
            same: self.same(&best.mistakes),
            mistakes: best.mistakes.into_iter().collect(),
            routed: best.routed,
            shared: best.shared,
            residual: best.residual,
            notes,
        }
    }

    /// Single mistakes whose readings are those of `mistake`: this checkpoint cannot tell them apart.
    /// `None` stands for no mistake at all.
    pub fn class_of(&self, mistake: Mistake) -> Vec<Option<Mistake>> {
        let own = BTreeSet::from([mistake]);
        let Some(page) = self.book.iter().find(|page| page.mistakes == own) else {
            return Vec::new();
        };
        self.book
            .iter()
            .filter(|other| other.mistakes.len() <= 1 && other.mistakes != own)
            .filter(|other| self.alike(page, other))
            .map(|other| other.mistakes.first().copied())
            .collect()
    }

    fn same(&self, mistakes: &BTreeSet<Mistake>) -> Vec<Mistake> {
        match mistakes.len() {
            1 => mistakes.iter().flat_map(|one| self.class_of(*one)).flatten().collect(),
            _ => Vec::new(),
        }
    }

    fn alike(&self, a: &Page, b: &Page) -> bool {
        let close = |a: &f64, b: &f64| {
            a.is_finite() == b.is_finite() && (!a.is_finite() || (a - b).abs() < 2e-3)
        };
        let parts = |page: &'_ Page, probe: usize| -> Vec<f64> {
            [&page.routed[probe][..], &page.shared[probe]].concat()
        };
        self.fitted.iter().all(|probe| {
            let (a, b) = (parts(a, *probe), parts(b, *probe));
            a.iter().zip(&b).all(|(a, b)| close(a, b))
        })
    }

    /// The page's parts, each with the multiplier that brings it nearest to the readings; `None`
    /// if one is finite where the other is not.
    fn fit(&self, page: &Page, readings: &Readings) -> Option<Fit> {
        // sums of r·r, r·s, s·s, r·y, s·y over what is finite
        let (mut rr, mut rs, mut ss, mut ry, mut sy) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let permuted = page.mistakes.contains(&Mistake::ExpertsPermuted);
        let mut used = Vec::new();
        for probe in &self.fitted {
            let (routed, shared) = (&page.routed[*probe], &page.shared[*probe]);
            let mut seen = readings.0[*probe].clone();
            if permuted {
                self.block.sort_experts(&mut seen);
            }
            let finite = routed.iter().all(|v| v.is_finite());
            if finite != seen.iter().all(|v| v.is_finite()) {
                return None;
            }
            if !finite {
                continue;
            }
            for ((r, s), y) in routed.iter().zip(shared).zip(&seen) {
                (rr, rs, ss) = (rr + r * r, rs + r * s, ss + s * s);
                (ry, sy) = (ry + r * y, sy + s * y);
                used.push((*r, *s, *y));
            }
        }
        let has_shared = self.block.family.shared != Shared::None;
        let (routed, shared) = match has_shared {
            false => (ry / rr, None),
            true => {
                let determinant = rr * ss - rs * rs;
                let routed = (ry * ss - sy * rs) / determinant;
                (routed, Some((sy * rr - ry * rs) / determinant))
            }
        };
        let error = |(r, s, y): &(f64, f64, f64)| {
            ((routed * r + shared.unwrap_or(0.0) * s - y) / (1.0 + y.abs())).powi(2)
        };
        let residual = (used.iter().map(error).sum::<f64>() / used.len() as f64).sqrt();
        // plain multipliers first: a bent explanation must earn its place
        let odd = match self.block.family.factor != 1.0 || near(routed, 1.0) {
            true => 0.0,
            false => NOISE,
        };
        // an order that is known explains more than any order
        let any = if permuted { 0.1 * NOISE } else { 0.0 };
        let cost = residual + odd + any + 0.1 * NOISE * page.mistakes.len() as f64;
        (residual.is_finite() && routed.is_finite()).then(|| Fit {
            mistakes: page.mistakes.clone(),
            routed,
            shared,
            residual,
            cost,
        })
    }

    fn faults(&self, best: &Fit) -> Vec<String> {
        let names: Vec<String> = best.mistakes.iter().map(Mistake::to_string).collect();
        let mut faults = match best.residual > NOISE {
            false => names,
            true => {
                let nearest = if names.is_empty() { "none".into() } else { names.join(", ") };
                vec![format!(
                    "unknown mistake (nearest known: {nearest}; residual {:.3})",
                    best.residual
                )]
            }
        };
        let factor = self.block.family.factor;
        if !near(best.routed, 1.0) {
            let what = match factor != 1.0 {
                true if near(best.routed, 1.0 / factor) => "scaling factor never applied",
                true if near(best.routed, factor) => "scaling factor applied twice",
                _ if near(best.routed, UP_SCALE) => {
                    "routed output multiplied, as it is where gate's tensor scale is used for up"
                }
                _ => "routed output multiplied",
            };
            faults.push(format!("{what} (x{:.3})", best.routed));
        }
        if let Some(shared) = best.shared
            && !near(shared, 1.0)
        {
            let gated = self.block.family.shared == Shared::Gated;
            let gate = sigmoid(SHARED_GATE);
            let what = match shared {
                _ if shared.abs() < 0.03 => "shared expert missing",
                _ if factor != 1.0 && near(shared, factor) => "shared expert scaled too",
                _ if gated && near(shared, 1.0 / gate) => "shared gate ignored",
                _ if gated && near(shared, SHARED_GATE / gate) => "shared gate without its sigmoid",
                _ => "shared expert multiplied",
            };
            faults.push(format!("{what} (x{shared:.3})"));
        }
        faults
    }

    /// What the choices say: those that a block with these mistakes makes as a right one does. What
    /// the mistakes explain is no freedom that was taken.
    fn notes(&self, readings: &Readings, mistakes: &BTreeSet<Mistake>) -> Vec<Note> {
        let [expected, _] = self.block.simulate(mistakes);
        let mut notes = BTreeSet::new();
        for choice in &self.block.probes.choices {
            let lead = |rows: &[Vec<f64>]| {
                rows[choice.probe][choice.better].abs() - rows[choice.probe][choice.other].abs()
            };
            // without biases, those that are near to each other decide nothing
            let tie = choice.question == Question::Bias && mistakes.contains(&Mistake::BiasIgnored);
            if tie || lead(&expected) <= 0.01 {
                continue;
            }
            let lead = lead(&readings.0);
            notes.extend(match (choice.question, lead.abs() > 0.01, lead > 0.0) {
                (question, false, _) => Some(Note::Unclear(question)),
                (Question::Tie, _, true) => Some(Note::TiesLowest),
                (Question::Tie, _, false) => Some(Note::TiesHighest),
                (Question::Logits, _, false) => Some(Note::LogitsRounded),
                (Question::Bias, _, false) => Some(Note::BiasRounded),
                (_, _, true) => None,
            });
        }
        notes.into_iter().collect()
    }
}

fn page(block: &Block, mistakes: BTreeSet<Mistake>) -> Page {
    let [routed, shared] = block.simulate(&mistakes);
    Page { mistakes, routed, shared }
}

fn near(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 0.03
}
