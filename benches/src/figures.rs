//! Medians, ratios and the tables they are printed in.

use std::fmt::Write;

/// The middle of the values, or the mean of the two in the middle; NaN of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Rows of figures under headings, and their medians.
#[derive(Debug, Clone, Default)]
pub struct Table {
    headings: Vec<String>,
    rows: Vec<(String, Vec<f64>)>,
}

impl Table {
    /// A table with these columns; the first column names the rows.
    #[must_use]
    pub fn new(headings: &[&str]) -> Table {
        Table { headings: headings.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// Adds a row; NaN is printed as a dash and counts in no median.
    pub fn row(&mut self, name: impl Into<String>, figures: &[f64]) {
        self.rows.push((name.into(), figures.to_vec()));
    }

    /// One column's figures, in the order of the rows.
    #[must_use]
    pub fn column(&self, index: usize) -> Vec<f64> {
        self.rows.iter().filter_map(|(_, row)| row.get(index).copied()).collect()
    }

    /// The median of one column.
    #[must_use]
    pub fn median(&self, index: usize) -> f64 {
        median(&known(&self.column(index)))
    }

    /// The table, its medians below; figures with `decimals` decimals.
    #[must_use]
    pub fn print(&self, decimals: usize) -> String {
        let medians = (0..self.headings.len()).map(|index| self.median(index)).collect();
        let all = self.rows.iter().cloned().chain([("median".to_owned(), medians)]);
        let mut text = format!("{:<14}", "");
        for heading in &self.headings {
            let _ = write!(text, "  {heading:>12}");
        }
        for (name, figures) in all {
            let _ = write!(text, "\n{name:<14}");
            for figure in figures {
                let cell = if figure.is_nan() { "-".to_owned() } else { format!("{figure:.decimals$}") };
                let _ = write!(text, "  {cell:>12}");
            }
        }
        text
    }
}

/// Two ways to say how much larger one is than the other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// Median of the rounds' own ratios: what disturbs a round disturbs both of its sides.
    pub paired: f64,
    /// Ratio of the two medians.
    pub of_medians: f64,
    /// The smallest and the largest of the rounds' ratios: how far the figure can be trusted.
    pub range: (f64, f64),
}

/// `ours[i] / theirs[i]`.
#[must_use]
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Ratio {
    let rounds: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
    let rounds = known(&rounds);
    Ratio {
        paired: median(&rounds),
        of_medians: median(&known(ours)) / median(&known(theirs)),
        range: (
            rounds.iter().copied().fold(f64::NAN, f64::min),
            rounds.iter().copied().fold(f64::NAN, f64::max),
        ),
    }
}

fn known(values: &[f64]) -> Vec<f64> {
    values.iter().copied().filter(|value| value.is_finite()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_found_in_any_order() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn ratios_are_paired_and_skip_what_is_unknown() {
        let ratio = ratio(&[2.0, 30.0, f64::NAN], &[1.0, 10.0, 5.0]);
        assert!((ratio.paired - 2.5).abs() < 1e-9);
        assert!((ratio.of_medians - 16.0 / 5.0).abs() < 1e-9);
        assert_eq!(ratio.range, (2.0, 3.0));
    }

    #[test]
    fn a_table_shows_its_rows_and_medians() {
        let mut table = Table::new(&["one", "two"]);
        table.row("1", &[1.0, f64::NAN]);
        table.row("2", &[2.0, 5.0]);
        let text = table.print(1);
        assert_eq!(text.lines().count(), 4);
        assert!(text.lines().nth(1).is_some_and(|line| line.ends_with('-')), "{text}");
        assert!(text.lines().nth(3).is_some_and(|line| line.starts_with("median") && line.contains("1.5")));
    }
}
