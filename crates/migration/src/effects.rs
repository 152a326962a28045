/// What to do now, in this order. Nothing in it has been done by the machine itself: an effect
/// that is dropped is a wait without an end.
#[must_use = "effects are what the machine decided; carry each one out"]
#[derive(Debug, Clone, PartialEq)]
pub struct Effects<E>(Vec<E>);

impl<E> Effects<E> {
    pub(crate) fn none() -> Effects<E> {
        Effects(Vec::new())
    }

    pub(crate) fn push(&mut self, effect: E) {
        self.0.push(effect);
    }

    /// The effects, first to carry out first.
    pub fn into_vec(self) -> Vec<E> {
        self.0
    }

    /// A look without taking.
    pub fn as_slice(&self) -> &[E] {
        &self.0
    }
}

impl<E> IntoIterator for Effects<E> {
    type Item = E;
    type IntoIter = std::vec::IntoIter<E>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
