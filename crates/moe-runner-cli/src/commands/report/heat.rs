//! Layers × experts: a cell for each, as strong in tone as what it stands for is large, and beside each layer a
//! strip with the numbers that sum it up. Few cells have their numbers in them; of many, neighbours of
//! one tone are one shape.

use std::fmt::Write;

use super::svg::{Anchor, Svg, WIDTH, number};

/// A cell's tone: what it looks like. Tones are told apart without colour, by how dark they are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tone {
    /// Nothing to show: hatched.
    Nothing,
    /// 1 to [`LEVELS`], from light to dark.
    Level(u8),
    /// Beyond what is right: crossed out.
    Over,
}

/// Levels of tones.
pub(super) const LEVELS: u8 = 9;

impl Tone {
    fn class(self) -> String {
        match self {
            Self::Nothing => "nothing".into(),
            Self::Level(level) => format!("t{level}"),
            Self::Over => "over".into(),
        }
    }

    /// Numbers in it are light on dark, or the other way round.
    fn ink(self) -> &'static str {
        match self {
            Self::Level(6..) => "inside deep",
            _ => "inside",
        }
    }
}

/// A mark in the strip beside a layer; places are 0 to 1.
pub(super) enum Mark {
    /// From the left edge to here.
    Bar(f64),
    Dot(f64),
    Ring(f64),
    /// A line through the whole row.
    Limit(f64),
}

/// A layer's row.
pub(super) struct Row {
    pub(super) layer: usize,
    /// One for each expert.
    pub(super) tones: Vec<Tone>,
    pub(super) marks: Vec<Mark>,
    /// What the strip says in words, where there is room.
    pub(super) words: String,
    /// All that is to be said of the layer.
    pub(super) title: String,
}

/// What a chart is.
pub(super) struct Heat<'a> {
    pub(super) label: &'a str,
    pub(super) rows: Vec<Row>,
    /// What the strip shows, and its axis: places and what they mean.
    pub(super) strip: (&'a str, Vec<(f64, String)>),
    /// Tones that occur, and what they mean.
    pub(super) legend: Vec<(Tone, String)>,
    /// Of a row and a column: what stands in the cell, and what is told of it.
    pub(super) cell: &'a dyn Fn(usize, usize) -> (String, String),
}

/// Up to so many cells have an element, and a title, each.
const CELLS: usize = 4096;

const LEFT: f64 = 44.0;
const TOP: f64 = 40.0;
const STRIP: f64 = 200.0;
const GAP: f64 = 18.0;

/// Characters of a cell's number are so wide.
const CHARACTER: f64 = 6.4;

impl Heat<'_> {
    pub(super) fn draw(&self) -> String {
        let columns = self.rows.iter().map(|row| row.tones.len()).max().unwrap_or(0).max(1);
        let rows = self.rows.len().max(1);
        let width = (WIDTH - LEFT - GAP - STRIP) / columns as f64;
        let height = (560.0 / rows as f64).clamp(7.0, 26.0);
        let bottom = TOP + height * rows as f64;
        let mut svg = Svg::new();
        self.axes(&mut svg, columns, (width, height), bottom);
        for (r, row) in self.rows.iter().enumerate() {
            let y = TOP + height * r as f64;
            match rows * columns <= CELLS {
                true => self.cells(&mut svg, r, y, (width, height)),
                false => runs(&mut svg, row, y, (width, height)),
            }
            self.strip(&mut svg, row, y, height);
        }
        let height = self.legend(&mut svg, bottom + 34.0);
        svg.finish(height, self.label)
    }

    fn axes(&self, svg: &mut Svg, columns: usize, (width, height): (f64, f64), bottom: f64) {
        svg.text("axis", (LEFT - 8.0, TOP - 22.0), Anchor::End, "layer");
        svg.text("axis", (LEFT, TOP - 22.0), Anchor::Start, "expert");
        let step = steps(30.0 / width);
        for column in (0..columns).step_by(step) {
            let x = LEFT + width * (column as f64 + 0.5);
            svg.text("tick", (x, TOP - 6.0), Anchor::Middle, &column.to_string());
        }
        let step = steps(13.0 / height);
        for (r, row) in self.rows.iter().enumerate().step_by(step) {
            let y = TOP + height * (r as f64 + 0.5) + 4.0;
            svg.text("tick", (LEFT - 8.0, y), Anchor::End, &row.layer.to_string());
        }
        let (title, ticks) = &self.strip;
        let left = WIDTH - STRIP;
        svg.text("axis", (left, TOP - 22.0), Anchor::Start, title);
        for (place, text) in ticks {
            let x = left + place * self.strip_width();
            svg.line("grid", (x, TOP), (x, bottom));
            svg.text("tick", (x, TOP - 6.0), Anchor::Middle, text);
        }
    }

    /// The strip leaves room for words where rows are few.
    fn strip_width(&self) -> f64 {
        let longest = self.rows.iter().map(|row| row.words.chars().count()).max().unwrap_or(0);
        STRIP - 14.0 - longest as f64 * CHARACTER
    }

    fn cells(&self, svg: &mut Svg, r: usize, y: f64, (width, height): (f64, f64)) {
        // lines between cells, where that leaves something of them
        let air = if width > 6.0 { 1.0 } else { 0.0 };
        for (column, tone) in self.rows[r].tones.iter().enumerate() {
            let x = LEFT + width * column as f64;
            let (inside, title) = (self.cell)(r, column);
            let class = format!("c {}", tone.class());
            svg.rect(&class, (x, y, width - air, height - air), &title);
            if inside.chars().count() as f64 * CHARACTER < width - 4.0 && height >= 15.0 {
                let at = (x + (width - air) / 2.0, y + height / 2.0 + 4.0);
                svg.text(tone.ink(), at, Anchor::Middle, &inside);
            }
        }
    }

    fn strip(&self, svg: &mut Svg, row: &Row, y: f64, height: f64) {
        let (left, width) = (WIDTH - STRIP, self.strip_width());
        let middle = y + height / 2.0;
        let radius = (height * 0.3).min(4.5);
        for mark in &row.marks {
            match *mark {
                Mark::Bar(part) => {
                    let thick = (height * 0.6).min(12.0);
                    let bar = (left, middle - thick / 2.0, part * width, thick);
                    svg.rect("bar", bar, &row.title);
                }
                Mark::Dot(part) => {
                    svg.circle("dot", (left + part * width, middle), radius, &row.title);
                }
                Mark::Ring(part) => {
                    svg.circle("ring", (left + part * width, middle), radius, &row.title);
                }
                Mark::Limit(part) => {
                    let x = left + part * width;
                    svg.line("limit", (x, y), (x, y + height));
                }
            }
        }
        svg.text("tick", (WIDTH, middle + 4.0), Anchor::End, &row.words);
    }

    /// Tones and their meaning, and where the picture ends.
    fn legend(&self, svg: &mut Svg, top: f64) -> f64 {
        let (mut x, mut y) = (LEFT, top);
        for (tone, text) in &self.legend {
            let width = 24.0 + text.chars().count() as f64 * 6.6 + 18.0;
            if x + width > WIDTH {
                (x, y) = (LEFT, y + 22.0);
            }
            let class = format!("c {}", tone.class());
            svg.rect(&class, (x, y - 12.0, 18.0, 14.0), "");
            svg.text("tick", (x + 24.0, y), Anchor::Start, text);
            x += width;
        }
        y + 12.0
    }
}

/// Neighbours of one tone in one shape, and over all of them one that tells of the row.
fn runs(svg: &mut Svg, row: &Row, y: f64, (width, height): (f64, f64)) {
    let mut shapes: Vec<(Tone, String)> = Vec::new();
    let mut start = 0;
    for run in row.tones.chunk_by(|a, b| a == b) {
        let x = LEFT + width * start as f64;
        let length = width * run.len() as f64;
        start += run.len();
        let shapes = match shapes.iter().position(|(tone, _)| *tone == run[0]) {
            Some(at) => &mut shapes[at].1,
            None => {
                shapes.push((run[0], String::new()));
                &mut shapes.last_mut().expect("pushed just now").1
            }
        };
        let [x, y, length, height] = [x, y, length, height].map(number);
        let _ = write!(shapes, "M{x} {y}h{length}v{height}h-{length}z");
    }
    for (tone, d) in shapes {
        svg.path(&format!("c {}", tone.class()), &d, "");
    }
    svg.rect("cover", (LEFT, y, width * start as f64, height), &row.title);
}

/// 1, 2, 5, 10, …: at least `least`; 1, 2, 4, 8, … would count experts as well, but people count in tens.
fn steps(least: f64) -> usize {
    let mut step = 1;
    for factor in [2.0, 2.5, 2.0].into_iter().cycle() {
        if step as f64 >= least {
            break;
        }
        step = (step as f64 * factor) as usize;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Many cells: every layer is there and tells of itself, and the page stays small.
    #[test]
    fn a_large_model_fits() {
        let (layers, experts) = (94, 512);
        let tone = |l: usize, e: usize| Tone::Level(1 + ((l * 7 + e) % 9) as u8);
        let rows = (0..layers).map(|l| Row {
            layer: l,
            tones: (0..experts).map(|e| tone(l, e)).collect(),
            marks: vec![Mark::Bar(0.5)],
            words: String::new(),
            title: format!("layer {l}: told"),
        });
        let heat = Heat {
            label: "a large model",
            rows: rows.collect(),
            strip: ("", Vec::new()),
            legend: vec![(Tone::Level(1), "few".into())],
            cell: &|_, _| unreachable!("no cell has an element of its own"),
        };
        let svg = heat.draw();
        for l in 0..layers {
            assert!(svg.contains(&format!("<title>layer {l}: told</title>")), "{l}");
        }
        // all of a row's width is covered, by shapes of each tone
        assert_eq!(svg.matches("<path class=\"c t").count(), layers * 9);
        let cell = (WIDTH - LEFT - GAP - STRIP) / experts as f64;
        assert!(svg.contains(&format!("h{}v", number(cell))));
        assert!(svg.len() < 3 << 20, "{}", svg.len());
    }

    #[test]
    fn ticks_are_round_numbers() {
        for (least, step) in [(0.3, 1), (1.5, 2), (2.1, 5), (6.0, 10), (20.0, 20), (21.0, 50)] {
            assert_eq!(steps(least), step, "{least}");
        }
    }
}
