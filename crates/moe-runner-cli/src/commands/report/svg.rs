//! Pictures as SVG: what the charts need of it, and no more. Colours are classes; the page's style
//! sheet has them, for light, dark and paper.

use std::fmt::Write;

use super::html::escape;

/// Units across a picture; a browser scales them to the page.
pub(in crate::commands) const WIDTH: f64 = 1000.0;

/// Where a text is held.
#[derive(Clone, Copy)]
pub(in crate::commands) enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture in the making.
pub(in crate::commands) struct Svg {
    body: String,
}

impl Svg {
    pub(in crate::commands) fn new() -> Self {
        Self { body: String::new() }
    }

    /// The picture, `height` units high; `label` tells what it is to those who do not see it.
    pub(in crate::commands) fn finish(self, height: f64, label: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n{}</svg>\n",
            number(WIDTH),
            number(height),
            escape(label),
            self.body
        )
    }

    /// The same as a file of its own, with the page's style.
    pub(in crate::commands) fn finish_alone(self, height: f64, label: &str) -> String {
        let picture = self.finish(height, label);
        let root = "<svg xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\" ";
        let style = concat!("<style>\n", include_str!("page.css"), "</style>\n");
        let paper = "<rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n";
        let (start, body) = picture.split_once('\n').unwrap_or_default();
        format!("{root}{}\n{style}{paper}{body}", start.trim_start_matches("<svg "))
    }

    /// A rectangle; `title` is told where the pointer rests.
    pub(in crate::commands) fn rect(
        &mut self,
        class: &str,
        (x, y, w, h): (f64, f64, f64, f64),
        title: &str,
    ) {
        let [x, y, w, h] = [x, y, w, h].map(number);
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\""
        );
        self.end("rect", title);
    }

    pub(in crate::commands) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(number);
        let _ = writeln!(
            self.body,
            "<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"
        );
    }

    /// A path; `d` as SVG has it.
    pub(in crate::commands) fn path(&mut self, class: &str, d: &str, title: &str) {
        let _ = write!(self.body, "<path class=\"{class}\" d=\"{d}\"");
        self.end("path", title);
    }

    pub(in crate::commands) fn circle(
        &mut self,
        class: &str,
        (x, y): (f64, f64),
        radius: f64,
        title: &str,
    ) {
        let [x, y, r] = [x, y, radius].map(number);
        let _ = write!(self.body, "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"{r}\"");
        self.end("circle", title);
    }

    pub(in crate::commands) fn text(
        &mut self,
        class: &str,
        (x, y): (f64, f64),
        anchor: Anchor,
        text: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let [x, y] = [x, y].map(number);
        let _ = writeln!(
            self.body,
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>",
            escape(text)
        );
    }

    fn end(&mut self, element: &str, title: &str) {
        let _ = match title {
            "" => writeln!(self.body, "/>"),
            title => writeln!(self.body, "><title>{}</title></{element}>", escape(title)),
        };
    }
}

/// A coordinate, to a hundredth.
pub(in crate::commands) fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Values to coordinates.
#[derive(Clone, Copy)]
pub(in crate::commands) struct Scale {
    log: bool,
    domain: (f64, f64),
    range: (f64, f64),
}

impl Scale {
    pub(in crate::commands) fn linear(domain: (f64, f64), range: (f64, f64)) -> Self {
        Self { log: false, domain, range }
    }

    /// Of positive values.
    pub(in crate::commands) fn log(domain: (f64, f64), range: (f64, f64)) -> Self {
        Self { log: true, domain: (domain.0.ln(), domain.1.ln()), range }
    }

    /// Where `value` is; what is outside, at the edge.
    pub(in crate::commands) fn at(&self, value: f64) -> f64 {
        let value = if self.log { value.ln() } else { value };
        let (least, most) = self.domain;
        let part = ((value - least) / (most - least)).clamp(0.0, 1.0);
        // no number: at the far edge, where it is seen
        let part = if part.is_nan() { 1.0 } else { part };
        self.range.0 + part * (self.range.1 - self.range.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_short() {
        for (value, text) in [(1.0, "1"), (0.125, "0.12"), (-0.001, "0"), (12.5, "12.5")] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn scales_end_at_their_edges() {
        let scale = Scale::log((1.0, 100.0), (0.0, 10.0));
        let at = |value| (scale.at(value) * 1e6).round() / 1e6;
        assert_eq!((at(1.0), at(10.0), at(1e3), at(0.0)), (0.0, 5.0, 10.0, 0.0));
        assert_eq!(scale.at(f64::NAN), 10.0);
        assert_eq!(Scale::linear((0.0, 2.0), (10.0, 0.0)).at(0.5), 7.5);
    }
}
