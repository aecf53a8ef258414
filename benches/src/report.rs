//! How results leave: JSON lines for scripts, tables for people, Markdown and a chart for the README.
#![forbid(unsafe_code)]

use crate::stats::Estimate;
use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

/// One figure by its stable name.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Stable name, such as `answer_cpu_vs_nginx_keepalive`.
    pub name: String,
    /// The median with its bounds.
    pub estimate: Estimate,
    /// `ratio`, `ns`, `us`, `s`, `bytes`, …
    pub unit: &'static str,
    /// Whom it is compared with; empty: nobody.
    pub peer: &'static str,
}

impl Figure {
    /// One line of JSON: `{"name", "value", "unit", "peer", "rounds"}`.
    pub fn json(&self) -> String {
        serde_json::json!({
            "name": self.name,
            "value": self.estimate.median,
            "unit": self.unit,
            "peer": self.peer,
            "rounds": self.estimate.count,
        })
        .to_string()
    }
}

/// A table of text: the first row is its head.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles.
    pub fn new<const N: usize>(titles: [&str; N]) -> Self {
        Self { rows: vec![titles.map(str::to_owned).to_vec()] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// As a Markdown table with aligned columns, which is as readable on a terminal: text to the left, figures to the right.
    pub fn markdown(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().map(|row| width(&row[column])).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let blanks = " ".repeat(width - self::width(cell));
                let _ = if column == 0 {
                    write!(text, "| {cell}{blanks} ")
                } else {
                    write!(text, "| {blanks}{cell} ")
                };
            }
            text.push_str("|\n");
            if number == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let dashes = "-".repeat(*width);
                    let _ =
                        if column == 0 { write!(text, "| {dashes} ") } else { write!(text, "| {dashes}:") };
                }
                text.push_str("|\n");
            }
        }
        text
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// A number with about three digits, as a person would write it.
pub fn number(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "–".into(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The median of an estimate, or a dash.
pub fn median(estimate: Option<Estimate>) -> String {
    estimate.map_or_else(|| "–".into(), |estimate| number(estimate.median))
}

/// Figures as a table: median and 95 % bounds.
pub fn figures(figures: &[Figure]) -> String {
    let mut table = Table::new(["figure", "median", "95 % bounds", "unit", "compared with", "rounds"]);
    for Figure { name, estimate, unit, peer } in figures {
        let bounds = match estimate.count {
            1 => "–".into(),
            _ => format!("{} – {}", number(estimate.lower), number(estimate.upper)),
        };
        table.row([
            format!("`{name}`"),
            number(estimate.median),
            bounds,
            (*unit).to_owned(),
            (*peer).to_owned(),
            estimate.count.to_string(),
        ]);
    }
    table.markdown()
}

/// Prints the figures as lines of JSON, or the report for people.
pub fn print(json: bool, figures: &[Figure], report: &str) {
    if json {
        for figure in figures {
            println!("{}", figure.json());
        }
    } else {
        println!("{report}");
    }
}

/// The figures as one object of JSON: medians by name, and with `_lower` behind the name the lower 95 % bounds of those that
/// were measured more than once.
pub fn object(figures: &[Figure]) -> String {
    let mut object = serde_json::Map::new();
    for Figure { name, estimate, .. } in figures {
        object.insert(name.clone(), estimate.median.into());
        if estimate.count > 1 {
            object.insert(format!("{name}_lower"), estimate.lower.into());
        }
    }
    serde_json::Value::Object(object).to_string()
}

/// Where and when a run was made, in a line of Markdown.
pub fn provenance(command: &str) -> io::Result<String> {
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let date = Command::new("date").args(["--utc", "+%Y-%m-%d"]).output()?;
    Ok(format!(
        "Measured by `{command}` on {}, {} ({} CPUs), Linux {}.",
        String::from_utf8_lossy(&date.stdout).trim(),
        model.unwrap_or("an unnamed CPU").trim(),
        cpu.lines().filter(|line| line.starts_with("processor")).count(),
        kernel.trim(),
    ))
}

/// Writes a result where the README shows it, and says so on stderr.
pub fn save(name: &str, text: &str) -> io::Result<()> {
    fs::create_dir_all(results())?;
    let path = results().join(name);
    fs::write(&path, text)?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn results() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("results")
}

/// One group of bars.
#[derive(Clone, Debug)]
pub struct Bars {
    /// What is measured, with its unit.
    pub title: String,
    /// Label, value, and whether it is ours.
    pub bars: Vec<(String, f64, bool)>,
}

/// A chart of horizontal bars as SVG; it follows the reader's light or dark theme.
pub fn chart(title: &str, groups: &[Bars]) -> String {
    const WIDTH: usize = 760;
    const LABELS: usize = 220;
    const ROW: usize = 24;
    let height = 44 + groups.iter().map(|group| 34 + group.bars.len() * ROW).sum::<usize>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n<title>{title}</title>\n<style>\n\
         text {{ fill: #1f2328 }} .ours {{ fill: #0969da }} .peer {{ fill: #8c959f }}\n\
         @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .ours {{ fill: #4493f8 }} .peer {{ fill: #656c76 }} }}\n\
         </style>\n<text x=\"0\" y=\"18\" font-size=\"15\" font-weight=\"600\">{}</text>\n",
        escape(title),
        title = escape(title),
    );
    let mut y = 36;
    for group in groups {
        let most = group.bars.iter().map(|(_, value, _)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(
            svg,
            "<text x=\"0\" y=\"{}\" font-weight=\"600\">{}</text>",
            y + 16,
            escape(&group.title)
        );
        y += 26;
        for (label, value, ours) in &group.bars {
            let length = value / most * (WIDTH - LABELS - 60) as f64;
            let class = if *ours { "ours" } else { "peer" };
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
                 <rect class=\"{class}\" x=\"{LABELS}\" y=\"{}\" width=\"{length:.1}\" height=\"{}\" rx=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text>",
                LABELS - 8,
                y + 14,
                escape(label),
                y + 2,
                ROW - 7,
                LABELS as f64 + length + 6.0,
                y + 14,
                number(*value),
            );
            y += ROW;
        }
        y += 8;
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_one_line_of_json() {
        let estimate = Estimate { median: 0.5, lower: 0.4, upper: 0.6, count: 20 };
        let figure = Figure { name: "x".into(), estimate, unit: "ratio", peer: "nginx" };
        assert_eq!(figure.json(), r#"{"name":"x","value":0.5,"unit":"ratio","peer":"nginx","rounds":20}"#);
    }

    #[test]
    fn figures_are_one_object_of_json() {
        let figure = |name: &str, count| Figure {
            name: name.into(),
            estimate: Estimate { median: 0.5, lower: 0.4, upper: 0.6, count },
            unit: "ratio",
            peer: "",
        };
        assert_eq!(object(&[figure("x", 20), figure("y", 1)]), r#"{"x":0.5,"x_lower":0.4,"y":0.5}"#);
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["server", "µs"]);
        table.row(["ours".into(), "5.1".into()]);
        table.row(["nginx – tuned".into(), "12.3".into()]);
        assert_eq!(
            table.markdown(),
            "| server        |   µs |\n| ------------- | ----:|\n| ours          |  5.1 |\n| nginx – tuned | 12.3 |\n"
        );
    }

    #[test]
    fn a_chart_escapes_its_labels() {
        let bars = Bars { title: "a < b".into(), bars: vec![("x & y".into(), 1.0, true)] };
        let svg = chart("t", &[bars]);
        assert!(svg.contains("a &lt; b") && svg.contains("x &amp; y") && svg.ends_with("</svg>\n"), "{svg}");
    }
}
