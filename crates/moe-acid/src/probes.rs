//! Probes: router logits that tell one mistake from another, as tokens.

use crate::Family;

/// The ruler: a coordinate of known size in every hidden state.
pub(crate) const RULER: f64 = 10.0;

/// The gate multiplies router coordinates by this: small coordinates leave room for the ruler.
pub(crate) const GATE: f64 = 8.0;

/// The lead of favoured experts, lost when logits are rounded to 16 bits.
pub(crate) const LEAD: f64 = 1.0 / 512.0;

/// All probes of a family.
#[derive(Debug)]
pub struct Probes {
    /// What each asks, in words.
    pub names: Vec<&'static str>,
    /// Router logits `[probes][experts]`, the lead of favoured experts included.
    pub logits: Vec<Vec<f64>>,
    /// Probes that drive a channel beyond what 16-bit floats hold.
    pub big: Vec<bool>,
    /// Probes that ask for one choice between two.
    pub choices: Vec<Choice>,
}

/// A choice between two experts.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The probe.
    pub probe: usize,
    /// The expert that is better, or has the lower id where both are equal.
    pub better: usize,
    /// The other one.
    pub other: usize,
    /// What decides.
    pub question: Question,
}

/// What decides a [`Choice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    /// Logits that differ by 2⁻⁹.
    Logits,
    /// Correction biases that differ by 2⁻⁷.
    Bias,
    /// Nothing: both are equal.
    Tie,
}

impl Probes {
    /// The probes of `family`.
    pub fn of(family: &Family) -> Self {
        let mut probes =
            Self { names: Vec::new(), logits: Vec::new(), big: Vec::new(), choices: Vec::new() };
        let all = &mut Adder { probes: &mut probes, experts: family.experts };
        match family.groups {
            Some(_) => grouped(all),
            None => plain(all, family),
        }
        for row in &mut probes.logits {
            family.favoured().into_iter().for_each(|expert| row[expert] += LEAD);
        }
        probes
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.logits.len()
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.logits.is_empty()
    }

    /// Whether a probe asks for a choice: its reading is read off, not fitted.
    pub fn asks(&self, probe: usize) -> bool {
        self.choices.iter().any(|choice| choice.probe == probe)
    }

    /// The router coordinates of a probe's embedding.
    pub fn coordinates(&self, family: &Family, probe: usize) -> Vec<f64> {
        let mut row = self.logits[probe].clone();
        family.favoured().into_iter().for_each(|expert| row[expert] -= LEAD);
        row.into_iter().map(|logit| logit / GATE).collect()
    }
}

struct Adder<'a> {
    probes: &'a mut Probes,
    experts: usize,
}

impl Adder<'_> {
    fn add(&mut self, name: &'static str, base: f64, changes: &[(usize, f64)]) {
        let mut row = vec![base; self.experts];
        changes.iter().for_each(|(expert, logit)| row[*expert] = *logit);
        self.probes.names.push(name);
        self.probes.logits.push(row);
        self.probes.big.push(false);
    }

    /// A choice between `better` and `other`, both at `logit`, beside `certain` ones.
    fn ask(
        &mut self,
        question: Question,
        base: f64,
        certain: &[(usize, f64)],
        (better, other, logit): (usize, usize, f64),
    ) {
        let name = match question {
            Question::Logits => "logits 2^-9 apart",
            Question::Bias => "biases 2^-7 apart",
            Question::Tie => "tie",
        };
        let probe = self.probes.len();
        self.add(name, base, &[certain, &[(better, logit), (other, logit)]].concat());
        self.probes.choices.push(Choice { probe, better, other, question });
    }

    fn add_big(&mut self, base: f64, changes: &[(usize, f64)]) {
        self.add("beyond 16-bit floats between the products", base, changes);
        *self.probes.big.last_mut().expect("one was added") = true;
    }
}

/// Sixteen experts in four groups of four, two groups and four experts a token.
fn grouped(all: &mut Adder<'_>) {
    all.add("low scores", -4.0, &[(0, -1.5), (1, -2.0), (5, -1.0), (6, -2.5)]);
    all.add("high scores", -4.0, &[(9, 3.0), (10, 1.0), (13, 2.0), (15, 0.5)]);
    // one very good expert in group 0, two fair ones in each of groups 1 and 2
    all.add(
        "one good expert against two fair groups",
        -6.0,
        &[(0, 3.0), (4, 1.5), (5, 1.25), (8, 1.0), (9, 0.75)],
    );
    // five experts above the rest in three groups: the limit to two leaves the third out
    all.add(
        "the third group is shut",
        -5.0,
        &[(0, 2.0), (1, 1.5), (4, 1.75), (5, 1.0), (12, 1.25)],
    );
    let order = [(2, -1.0), (3, 2.0), (6, 0.0), (7, 1.0)];
    all.add("the order of ids is not that of scores", -5.0, &order);
    let certain = [(8, 3.0), (9, 2.75), (10, 2.5)];
    all.ask(Question::Logits, -6.0, &certain, (13, 12, 2.0));
    all.ask(Question::Logits, -6.0, &certain, (14, 15, 2.0));
    all.ask(Question::Tie, -6.0, &certain, (12, 15, 2.0));
    // equal scores: only a bias in float32 tells 1 from 0, and 4 from 5
    all.ask(Question::Bias, -6.0, &[(4, 3.0), (5, 2.75), (6, 2.5)], (1, 0, 1.0));
    all.ask(Question::Bias, -6.0, &[(0, 3.0), (2, 2.75), (3, 2.5)], (4, 5, 1.0));
    // 11 has the larger bias and the smaller score
    let decides = [(8, 3.0), (9, 2.75), (4, 2.5), (5, 2.0), (11, 1.0), (10, 1.25)];
    all.add("the bias decides", -6.0, &decides);
    let good = [(8, 3.0), (9, 2.75), (4, 2.5)];
    let mut near = |name, best, second| {
        all.add(name, -6.0, &[&good[..], &[(5, best), (11, second)]].concat());
    };
    near("the bias twice would decide", 0.75, -0.5);
    near("the bias subtracted would decide", 0.5, 0.75);
    all.add_big(-6.0, &[(2, 2.0), (3, 1.0), (6, 0.0), (7, -1.0)]);
}

/// Experts without groups, one or two a token.
fn plain(all: &mut Adder<'_>, family: &Family) {
    all.add("low scores", -3.0, &[(0, -1.5), (5, -2.0)]);
    all.add("high scores", -3.0, &[(3, 3.0), (7, 1.0)]);
    all.add("the order of ids is not that of scores", -3.0, &[(1, -1.0), (6, 2.0)]);
    let certain: &[(usize, f64)] = if family.top_k > 1 { &[(2, 3.0)] } else { &[] };
    all.ask(Question::Logits, -3.0, certain, (5, 4, 2.0));
    all.ask(Question::Logits, -3.0, certain, (6, 7, 2.0));
    all.ask(Question::Tie, -3.0, certain, (4, 7, 2.0));
    if family.correction.is_some() {
        all.ask(Question::Bias, -3.0, certain, (9, 8, 1.0));
        all.ask(Question::Bias, -3.0, certain, (10, 11, 1.0));
        // 12 has the larger bias and the smaller score
        all.add("the bias decides", -3.0, &[(2, 3.0), (13, 1.0), (12, 0.75)]);
        all.add("the bias twice would decide", -3.0, &[(2, 3.0), (13, 1.0), (12, 0.375)]);
        all.add("the bias subtracted would decide", -3.0, &[(2, 3.0), (13, 0.875), (12, 1.0)]);
    }
    all.add_big(-3.0, &[(1, 2.0), (3, 1.0)]);
}
